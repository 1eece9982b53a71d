//! De-duplication: rows that occur more than once are stored once. With a tolerance, rows that differ little are taken
//! for equal, found by hashing as in Zhou et al. (2022); a row is only ever compared with rows that are kept, so that
//! differences do not add up.

use super::{check_codebooks, encode_nearest, group, Encoder, Learned, Quantizer};
use crate::bits;
use crate::decoder::{Books, CodebookDtype, Decoder};
use crate::error::{product, room, Error, Result};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use crate::rng::Rng;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Parameters of de-duplication.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeduplicatingQuantizer {
    tolerance: f64,
    codebook_dtype: CodebookDtype,
}

impl Default for DeduplicatingQuantizer {
    fn default() -> Self {
        DeduplicatingQuantizer { tolerance: 0.0, codebook_dtype: CodebookDtype::Float32 }
    }
}

/// Tables of hashes, and hashes that a row shares with another one in a table. Two rows that differ by independent numbers
/// inside the tolerance share one table with a probability of 0.6 at least, and all of them miss with one of 10^-8.
const BANDS: usize = 20;
const HASHES: usize = 4;

/// Width of a hash's buckets, in tolerances times the root of the columns.
const BUCKET: f64 = 4.0;

/// The bits of a row, with one zero for both.
type Key = Box<[u32]>;

fn key(row: &[f32]) -> Key {
    row.iter().map(|value| (value + 0.0).to_bits()).collect()
}

/// Rows that are kept, and how to find them again.
struct Keeper {
    dim: usize,
    tolerance: f64,
    rows: Vec<f32>,
    exact: HashMap<Key, u32>,
    /// Sums of columns with signs are hashed; signs of all hashes, one after the other.
    signs: Vec<f64>,
    shifts: Vec<f64>,
    buckets: Vec<HashMap<[i64; HASHES], Vec<u32>>>,
}

impl Keeper {
    fn new(dim: usize, tolerance: f64) -> Self {
        let hashes = if tolerance > 0.0 { BANDS * HASHES } else { 0 };
        // Always the same, so that codes depend on the decoder alone.
        let rng = Rng::new(0);
        let mut signs = Vec::with_capacity(hashes * dim);
        let mut stream = rng.stream(1);
        signs.extend((0..hashes * dim).map(|_| if stream.next_u64() >> 63 == 0 { 1.0 } else { -1.0 }));
        let mut stream = rng.stream(2);
        let shifts = (0..hashes).map(|_| stream.uniform()).collect();
        let buckets = vec![HashMap::new(); hashes / HASHES];
        Keeper { dim, tolerance, rows: Vec::new(), exact: HashMap::new(), signs, shifts, buckets }
    }

    fn len(&self) -> usize {
        self.rows.len() / self.dim
    }

    fn row(&self, at: u32) -> &[f32] {
        &self.rows[at as usize * self.dim..][..self.dim]
    }

    /// The row's bucket in each table.
    fn hashes(&self, row: &[f32]) -> Vec<[i64; HASHES]> {
        let width = BUCKET * self.tolerance * (self.dim as f64).sqrt();
        let hash = |at: usize| {
            let signs = &self.signs[at * self.dim..(at + 1) * self.dim];
            let sum: f64 = row.iter().zip(signs).map(|(value, sign)| f64::from(*value) * sign).sum();
            (sum / width + self.shifts[at]).floor() as i64
        };
        (0..self.buckets.len()).map(|band| std::array::from_fn(|i| hash(band * HASHES + i))).collect()
    }

    /// Squared distance from a kept row, if no value differs by more than the tolerance.
    fn distance(&self, at: u32, row: &[f32]) -> Option<f64> {
        let mut sum = 0.0;
        for (a, b) in self.row(at).iter().zip(row) {
            let difference = f64::from(*a) - f64::from(*b);
            if difference.abs() > self.tolerance {
                return None;
            }
            sum += difference * difference;
        }
        Some(sum)
    }

    /// The kept row that a row is taken for: equal, or the nearest one inside the tolerance; of equally near ones the first.
    fn find(&self, row: &[f32], key: &Key) -> Option<u32> {
        if let Some(at) = self.exact.get(key) {
            return Some(*at);
        }
        if self.tolerance == 0.0 {
            return None;
        }
        let mut best: Option<(f64, u32)> = None;
        for (hash, buckets) in self.hashes(row).iter().zip(&self.buckets) {
            for at in buckets.get(hash).into_iter().flatten() {
                let Some(distance) = self.distance(*at, row) else { continue };
                if best.is_none_or(|best| (distance, *at) < best) {
                    best = Some((distance, *at));
                }
            }
        }
        best.map(|(_, at)| at)
    }

    /// Keeps one more row. Of equal ones the first is found.
    fn keep(&mut self, row: &[f32], key: Key) {
        let at = self.len() as u32;
        for (hash, buckets) in self.hashes(row).into_iter().zip(&mut self.buckets) {
            buckets.entry(hash).or_default().push(at);
        }
        self.rows.extend(row.iter().map(|value| value + 0.0));
        self.exact.entry(key).or_insert(at);
    }
}

impl DeduplicatingQuantizer {
    fn decoder(&self, dim: usize, rows: Vec<f32>) -> Result<Decoder> {
        let entries = rows.len() / dim;
        let bits = bits_of(entries)?;
        check_codebooks(dim, bits)?;
        let books = vec![(group(dim, entries, vec![0]), rows)];
        Ok(Decoder::Books(Books::new(dim, bits, self.codebook_dtype, books)?))
    }
}

/// Bits of the number of a kept row.
fn bits_of(entries: usize) -> Result<u32> {
    let bits = (usize::BITS - (entries - 1).leading_zeros()).max(1);
    if bits > bits::MAX_BITS {
        return Err(Error::OutOfRange {
            what: format!("{entries} different rows are more than 2^{}", bits::MAX_BITS),
            why: "use another quantizer, or a larger tolerance".into(),
        });
    }
    Ok(bits)
}

impl Quantizer for DeduplicatingQuantizer {
    const NAME: &'static str = "deduplicating";
    const ABOUT: &'static str = "rows that occur more than once, or nearly so, are stored once";

    fn check(&self) -> Result<()> {
        if !(self.tolerance >= 0.0 && self.tolerance.is_finite()) {
            return Err(Error::parameter("tolerance", self.tolerance, "must be 0 or more"));
        }
        Ok(())
    }

    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder> {
        check_codebooks(dim, bits_of(rows)?)?;
        self.decoder(dim, crate::error::zeros("the kept rows", rows.checked_mul(dim))?)
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        ctx.stage("rows", data.len() as u64);
        room("the kept rows", &[product(&[data.len(), data.dim(), 16]), product(&[data.len(), 256])])?;
        let mut keeper = Keeper::new(data.dim(), self.tolerance);
        for at in 0..data.len() {
            if at % 256 == 0 {
                ctx.check()?;
                ctx.advance(256.min(data.len() - at) as u64);
            }
            // Rows without weight are as good as absent: they become the nearest kept row.
            if data.weight(at) == 0.0 {
                continue;
            }
            let row = data.rows.row(at);
            let key = key(row);
            if keeper.find(row, &key).is_none() {
                keeper.keep(row, key);
            }
        }
        Ok(Learned { decoder: self.decoder(data.dim(), keeper.rows)?, codes: None, n_iter: 1, notes: Vec::new() })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        let nearest = encode_nearest(decoder)?;
        let Decoder::Books(books) = decoder else {
            return Err(Error::shape("the decoder", decoder.form(), "the form books"));
        };
        let mut keeper = Keeper::new(books.dim(), self.tolerance);
        for (_, width, entries) in books.books() {
            for (at, row) in entries.chunks(width).enumerate() {
                if at % 256 == 0 {
                    ctx.check()?;
                }
                keeper.keep(row, key(row));
            }
        }
        let bits = books.bits();
        Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| {
            let found: Vec<Option<u32>> =
                (0..rows.rows()).map(|at| rows.row(at)).map(|row| keeper.find(row, &key(row))).collect();
            // Rows that none of those kept is equal to take the nearest one.
            if found.iter().any(Option::is_none) {
                nearest(rows, codes)?;
            }
            let bytes = codes.len() / rows.rows().max(1);
            for (found, code) in found.into_iter().zip(codes.chunks_mut(bytes.max(1))) {
                if let Some(found) = found {
                    bits::pack(std::iter::once(found), bits, code);
                }
            }
            Ok(())
        }))
    }
}
