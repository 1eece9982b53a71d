//! Beam search: for each row the best partial codes, extended stage by stage.
//!
//! Scores come from inner products of rows with codewords and of codewords with each other, so that no residual is
//! computed for a partial code.

use crate::algo::nearest::{Centroids, Columns};
use crate::error::{copied, product, reserved, zeros, Error, Result};
use crate::kernels::{self, Extension, BEAM_PADDING};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use crate::quantizer::{squared_distance, BLOCK_ROWS};

/// Codeword-codeword tables above this many bytes are not made: inner products are then taken of partial residuals.
const MAX_TABLES: usize = 512 << 20;

/// Inner products of this many pairs are held at a time: they stay in the second-level cache.
const PRODUCTS: usize = 1 << 16;

/// The best partial codes of some rows, equally many of each.
pub(in crate::quantizer) struct Beams {
    rows: usize,
    /// Entries of a partial code.
    stage: usize,
    /// Half the squared error of each partial code, the row's own norm left out. Best first.
    scores: Vec<f32>,
    paths: Vec<u16>,
}

impl Beams {
    /// One empty code a row.
    pub(in crate::quantizer) fn new(rows: usize) -> Self {
        Beams { rows, stage: 0, scores: vec![0.0; rows], paths: Vec::new() }
    }

    /// Partial codes of a row.
    fn count(&self) -> usize {
        self.scores.len() / self.rows
    }

    /// The best partial code of a row.
    pub(in crate::quantizer) fn best(&self, row: usize) -> &[u16] {
        &self.paths[row * self.count() * self.stage..][..self.stage]
    }

    /// Forgets all but the best.
    pub(in crate::quantizer) fn keep_best(&mut self) {
        self.paths = (0..self.rows).flat_map(|row| self.best(row).to_vec()).collect();
        self.scores = self.scores.chunks(self.count()).map(|scores| scores[0]).collect();
    }
}

/// Entry numbers, equally many a row.
#[derive(Clone)]
pub(in crate::quantizer) struct Codes {
    pub(in crate::quantizer) fields: usize,
    pub(in crate::quantizer) values: Vec<u16>,
}

impl Codes {
    /// The best codes of consecutive blocks of rows.
    pub(in crate::quantizer) fn of(blocks: &[Beams]) -> Self {
        let values = blocks.iter().flat_map(|block| (0..block.rows).flat_map(|row| block.best(row).to_vec())).collect();
        Codes { fields: blocks[0].stage, values }
    }

    /// Number of rows.
    pub(in crate::quantizer) fn len(&self) -> usize {
        self.values.len() / self.fields
    }

    pub(in crate::quantizer) fn row(&self, row: usize) -> &[u16] {
        &self.values[row * self.fields..(row + 1) * self.fields]
    }
}

/// Full-width codebooks on top of each other, with what the beam search needs of them.
pub(in crate::quantizer) struct Stages {
    pub(in crate::quantizer) dim: usize,
    pub(in crate::quantizer) entries: usize,
    /// Stage after stage, entry after entry.
    pub(in crate::quantizer) centers: Vec<f32>,
    pub(in crate::quantizer) packed: Vec<Centroids>,
    /// Padded as [`Extension`] wants them, and the tables too.
    pub(in crate::quantizer) half_norms: Vec<Vec<f32>>,
    /// `tables[m][i]`: inner products of stage i's entries (rows) with stage m's, i < m. Empty where too large.
    pub(in crate::quantizer) tables: Vec<Vec<Vec<f32>>>,
}

impl Stages {
    pub(in crate::quantizer) fn new(dim: usize, entries: usize) -> Self {
        Stages { dim, entries, centers: Vec::new(), packed: Vec::new(), half_norms: Vec::new(), tables: Vec::new() }
    }

    pub(in crate::quantizer) fn len(&self) -> usize {
        self.packed.len()
    }

    fn book(&self, stage: usize) -> &[f32] {
        let size = self.entries * self.dim;
        &self.centers[stage * size..(stage + 1) * size]
    }

    fn entry(&self, stage: usize, entry: u16) -> &[f32] {
        &self.book(stage)[usize::from(entry) * self.dim..][..self.dim]
    }

    /// Whether tables between `stages` stages fit.
    pub(in crate::quantizer) fn tables_fit(&self, stages: usize) -> bool {
        stages * (stages + 1) / 2 * self.entries * self.entries * 4 <= MAX_TABLES
    }

    /// Adds a stage.
    pub(in crate::quantizer) fn push(&mut self, centers: Vec<f32>, ctx: &Context) -> Result<()> {
        // Books of a decoder that was not made by the fit of its kind.
        if centers.is_empty() || centers.len() != self.entries * self.dim {
            let expected = format!("{} entries of {} values in each book", self.entries, self.dim);
            return Err(Error::shape("the decoder", format!("a book of {} values", centers.len()), expected));
        }
        let half = |c: &[f32]| (c.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / 2.0) as f32;
        let padding = [f32::NAN; BEAM_PADDING];
        self.half_norms.push(centers.chunks(self.dim).map(half).chain(padding).collect());
        let packed = Centroids::new(&centers, self.dim);
        let mut tables = Vec::new();
        if self.tables_fit(self.len() + 1) {
            for stage in 0..self.len() {
                let size = self.entries * self.entries;
                let mut table = zeros("products of codebooks", Some(size + BEAM_PADDING))?;
                let book = Matrix::new(self.book(stage), self.dim)?;
                ctx.chunks(&mut table[..size], 64 * self.entries, |index, chunk| {
                    let rows = book.block(index * 64..index * 64 + chunk.len() / self.entries);
                    packed.dots_block(Columns::from(rows), chunk);
                    Ok(())
                })?;
                tables.push(table);
            }
        } else {
            self.tables.iter_mut().for_each(Vec::clear);
        }
        self.tables.push(tables);
        self.packed.push(packed);
        let mut all = reserved("the codebooks", self.centers.len().checked_add(centers.len()))?;
        all.append(&mut self.centers);
        all.extend(centers);
        self.centers = all;
        Ok(())
    }

    /// Replaces all codebooks.
    pub(in crate::quantizer) fn replace(&mut self, centers: Vec<f32>, ctx: &Context) -> Result<()> {
        let size = self.entries * self.dim;
        *self = Stages::new(self.dim, self.entries);
        centers.chunks(size).try_for_each(|book| self.push(copied("the codebooks", book)?, ctx))
    }

    pub(in crate::quantizer) fn encode(&self, rows: Matrix, beam: usize, ctx: &Context) -> Result<Codes> {
        let mut values = zeros("the codes", rows.rows().checked_mul(self.len()))?;
        ctx.chunks(&mut values, BLOCK_ROWS * self.len(), |index, chunk| {
            let start = index * BLOCK_ROWS;
            let mut beams = Beams::new(chunk.len() / self.len());
            self.extend_all(rows.block(start..start + beams.rows), &mut beams, beam, ctx)?;
            chunk.chunks_mut(self.len()).enumerate().for_each(|(row, code)| code.copy_from_slice(beams.best(row)));
            Ok(())
        })?;
        Ok(Codes { fields: self.len(), values })
    }

    /// Extends rows' partial codes to the last stage, on the calling thread. Rows do not influence each other.
    pub(in crate::quantizer) fn extend_all(
        &self,
        rows: Matrix,
        beams: &mut Beams,
        beam: usize,
        ctx: &Context,
    ) -> Result<()> {
        (beams.stage..self.len()).try_for_each(|_| self.extend(rows, beams, beam, ctx))
    }

    /// Extends rows' partial codes by one stage.
    fn extend(&self, rows: Matrix, beams: &mut Beams, beam: usize, ctx: &Context) -> Result<()> {
        if beam == 1 {
            return self.extend_greedily(rows, beams, ctx);
        }
        let (stage, count) = (beams.stage, beams.count());
        let with_tables = self.tables_fit(self.len());
        let keep = beam.min(count * self.entries);
        let mut scores = zeros("partial codes", product(&[beams.rows, keep]))?;
        let mut paths = zeros("partial codes", product(&[beams.rows, keep, stage + 1]))?;
        // Partial codes whose products are taken: all the same for a row if there are tables.
        let branches = if with_tables { 1 } else { count };
        let step = (PRODUCTS / (branches * self.entries)).clamp(1, beams.rows);
        let size = product(&[step, branches, self.entries]).and_then(|size| size.checked_add(BEAM_PADDING));
        let mut products = zeros("products of partial codes", size)?;
        let size = if with_tables { Some(0) } else { product(&[step, count, self.dim]) };
        let mut partial: Vec<f32> = zeros("what partial codes leave", size)?;
        for first in (0..beams.rows).step_by(step) {
            ctx.check()?;
            let last = beams.rows.min(first + step);
            let old = &beams.paths[first * count * stage..last * count * stage];
            let rows = if with_tables {
                rows.block(first..last)
            } else {
                let partial = &mut partial[..(last - first) * count * self.dim];
                for (index, residual) in partial.chunks_mut(self.dim).enumerate() {
                    self.subtract(rows.row(first + index / count), &old[index * stage..][..stage], residual);
                }
                Matrix::new(partial, self.dim)?
            };
            let size = rows.rows() * self.entries;
            self.packed[stage].dots_block(Columns::from(rows), &mut products[..size]);
            let task = Extension {
                rows: last - first,
                count,
                entries: self.entries,
                stage,
                scores: &beams.scores[first * count..last * count],
                paths: old,
                half_norms: &self.half_norms[stage],
                products: &products,
                tables: if with_tables { &self.tables[stage] } else { &[] },
            };
            let paths = &mut paths[first * keep * (stage + 1)..last * keep * (stage + 1)];
            (kernels::best().extend)(&task, &mut scores[first * keep..last * keep], paths);
        }
        *beams = Beams { rows: beams.rows, stage: stage + 1, scores, paths };
        Ok(())
    }

    /// [`Stages::extend`] for the best code alone: the nearest entry to what it leaves.
    fn extend_greedily(&self, rows: Matrix, beams: &mut Beams, ctx: &Context) -> Result<()> {
        ctx.check()?;
        let stage = beams.stage;
        let mut residual = vec![0f32; rows.data().len()];
        for (row, residual) in residual.chunks_mut(self.dim).enumerate() {
            self.subtract(rows.row(row), beams.best(row), residual);
        }
        let mut labels = vec![0u32; beams.rows];
        self.packed[stage].nearest(Columns::contiguous(&residual, self.dim), &mut labels, None, &ctx.serial())?;
        let extended =
            |(row, label): (usize, &u32)| beams.best(row).iter().copied().chain([*label as u16]).collect::<Vec<_>>();
        let paths = labels.iter().enumerate().flat_map(extended).collect();
        *beams = Beams { stage: stage + 1, paths, scores: vec![0.0; beams.rows], ..*beams };
        Ok(())
    }

    /// What a code leaves of a row.
    fn subtract(&self, row: &[f32], code: &[u16], residual: &mut [f32]) {
        residual.copy_from_slice(row);
        for (stage, entry) in code.iter().enumerate() {
            (kernels::best().axpy)(residual, self.entry(stage, *entry), -1.0);
        }
    }

    /// What the best codes of consecutive blocks of rows leave of these.
    pub(in crate::quantizer) fn residuals(
        &self,
        rows: Matrix,
        blocks: &[Beams],
        out: &mut [f32],
        ctx: &Context,
    ) -> Result<()> {
        ctx.chunks(out, BLOCK_ROWS * self.dim, |block, chunk| {
            for (row, residual) in chunk.chunks_mut(self.dim).enumerate() {
                self.subtract(rows.row(block * BLOCK_ROWS + row), blocks[block].best(row), residual);
            }
            Ok(())
        })
    }

    /// Weighted sum of squares that codes leave of all rows.
    pub(in crate::quantizer) fn error(&self, data: Sample, codes: &Codes, ctx: &Context) -> Result<f64> {
        let blocks = ctx.map(data.len().div_ceil(BLOCK_ROWS), |block| {
            let (mut residual, zero) = (vec![0f32; self.dim], vec![0f32; self.dim]);
            let rows = block * BLOCK_ROWS..data.len().min((block + 1) * BLOCK_ROWS);
            let mut error = |row: usize| {
                self.subtract(data.rows.row(row), codes.row(row), &mut residual);
                data.weight(row) * squared_distance(&residual, &zero)
            };
            Ok(rows.map(&mut error).sum::<f64>())
        })?;
        Ok(blocks.iter().sum())
    }

    /// Takes `fresh` codes in rows where they have less error.
    pub(in crate::quantizer) fn keep_better(
        &self,
        rows: Matrix,
        codes: &mut Codes,
        fresh: Codes,
        ctx: &Context,
    ) -> Result<()> {
        let fields = codes.fields;
        ctx.chunks(&mut codes.values, BLOCK_ROWS * fields, |index, chunk| {
            let mut residual = vec![0f32; self.dim];
            let zero = vec![0f32; self.dim];
            let mut error = |row: usize, code: &[u16]| {
                self.subtract(rows.row(row), code, &mut residual);
                squared_distance(&residual, &zero)
            };
            for (row, code) in chunk.chunks_mut(fields).enumerate() {
                let row = index * BLOCK_ROWS + row;
                if error(row, fresh.row(row)) < error(row, code) {
                    code.copy_from_slice(fresh.row(row));
                }
            }
            Ok(())
        })
    }
}
