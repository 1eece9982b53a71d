//! Iterated local search: better codes for rows that have some already.

use crate::algo::nearest::Columns;
use crate::decoder::power_of_two;
use crate::error::{product, zeros, Error, Result};
use crate::kernels::{self, Descent, Kick, BEAM_PADDING};
use crate::matrix::Matrix;
use crate::pool::Context;
use crate::quantizer::residual::beam::{Codes, Stages};
use crate::quantizer::BLOCK_ROWS;
use crate::rng::Rng;

/// Inner products of all entries with each other take at most so many bytes.
const MAX_PAIRS: usize = 512 << 20;

/// Inner products of this many rows and entries are held at a time: they stay in the second-level cache.
const PRODUCTS: usize = 1 << 16;

/// Visits of all books after the start and after each kick, at most.
const SWEEPS: usize = 4;

/// Refuses books whose inner products take too much room.
pub(super) fn check_pairs(books: usize, entries: usize) -> Result<()> {
    let size = books.saturating_mul(entries);
    match size.saturating_mul(size).saturating_mul(2) <= MAX_PAIRS {
        true => Ok(()),
        false => Err(Error::OutOfRange {
            what: format!("{books} codebooks of {entries} entries are too many to be searched together"),
            why: "use fewer bits or codebooks, or the kind residual".into(),
        }),
    }
}

/// What the search needs of codebooks beyond what the beam search does.
pub(super) struct Search {
    /// See [`Descent`].
    pairs: Vec<u16>,
    scale: f32,
}

impl Search {
    pub(super) fn new(stages: &Stages, ctx: &Context) -> Result<Self> {
        let (books, size) = (stages.len(), stages.entries * stages.entries);
        check_pairs(books, stages.entries)?;
        let tables = || stages.tables.iter().flatten();
        let largest = tables().map(|table| table.iter().fold(0f32, |m, v| m.max(v.abs()))).fold(0.0, f32::max);
        let scale = power_of_two(largest);
        let count = product(&[books, books, size]).and_then(|count| count.checked_add(BEAM_PADDING));
        let mut pairs = zeros("products of codebooks", count)?;
        ctx.chunks(&mut pairs[..books * books * size], size, |index, out| {
            let (book, other) = (index / books, index % books);
            let table = &stages.tables[book.max(other)];
            if book != other {
                let scaled: Vec<f32> = match book < other {
                    true => table[book][..size].iter().map(|v| v / scale).collect(),
                    false => transposed(&table[other][..size], stages.entries, scale),
                };
                (kernels::best().to_f16)(&scaled, out);
            }
            Ok(())
        })?;
        Ok(Search { pairs, scale })
    }

    /// Betters the codes of all rows.
    pub(super) fn improve(
        &self,
        stages: &Stages,
        rows: Matrix,
        codes: &mut Codes,
        kicks: &[Kick],
        ctx: &Context,
    ) -> Result<()> {
        let fields = codes.fields;
        ctx.chunks(&mut codes.values, BLOCK_ROWS * fields, |index, codes| {
            let start = index * BLOCK_ROWS;
            self.improve_block(stages, rows.block(start..start + codes.len() / fields), codes, kicks, ctx)
        })
    }

    /// Betters the codes of some rows, on the calling thread. Rows do not influence each other.
    pub(super) fn improve_block(
        &self,
        stages: &Stages,
        rows: Matrix,
        codes: &mut [u16],
        kicks: &[Kick],
        ctx: &Context,
    ) -> Result<()> {
        let (books, entries) = (stages.len(), stages.entries);
        let step = (PRODUCTS / (books * entries)).clamp(1, rows.rows().max(1));
        let mut products = vec![vec![0f32; step * entries + BEAM_PADDING]; books];
        let mut scores = vec![0f32; step];
        for (index, codes) in codes.chunks_mut(step * books).enumerate() {
            ctx.check()?;
            let count = codes.len() / books;
            let rows = rows.block(index * step..index * step + count);
            for (book, products) in stages.packed.iter().zip(&mut products) {
                book.dots_block(Columns::from(rows), &mut products[..count * entries]);
            }
            let task = Descent {
                rows: count,
                entries,
                half_norms: &stages.half_norms,
                products: &products,
                pairs: &self.pairs,
                scale: self.scale,
                sweeps: SWEEPS,
                kicks,
            };
            (kernels::best().descend)(&task, codes, &mut scores[..count]);
        }
        Ok(())
    }
}

/// `count` kicks of `moved` books each: these go to random entries and are visited last, so that the others follow first.
pub(super) fn kicks(count: usize, moved: usize, books: usize, entries: usize, rng: &mut Rng) -> Vec<Kick> {
    let kick = |_| {
        let mut kick = Kick { shifts: vec![0; books], order: Vec::with_capacity(books) };
        for book in rng.sample(books, moved) {
            kick.shifts[book] = 1 + rng.below(entries - 1);
        }
        kick.order.extend((0..books).filter(|book| kick.shifts[*book] == 0));
        kick.order.extend((0..books).filter(|book| kick.shifts[*book] != 0));
        kick
    };
    let useful = entries > 1 && books > 1;
    (0..if useful { count } else { 0 }).map(kick).collect()
}

/// A square table with rows and columns exchanged, over `scale`.
fn transposed(table: &[f32], size: usize, scale: f32) -> Vec<f32> {
    let mut out = vec![0f32; size * size];
    for (row, values) in table.chunks_exact(size).enumerate() {
        values.iter().enumerate().for_each(|(column, value)| out[column * size + row] = value / scale);
    }
    out
}
