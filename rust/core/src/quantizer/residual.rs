//! Residual quantization (Chen, Guan and Wang, 2010): a row is a sum of entries, one of each stage's codebook.
//!
//! Encoding is a beam search over inner products and codeword-codeword tables (Babenko and Lempitsky, 2014), so that no
//! residual is computed for a beam entry. After the stages are trained one by one, all codebooks are refined together:
//! least squares for the codes, then codes for the codebooks, keeping each row's old code where that is better.

use super::{check_codebooks, check_loop, group, note_distinct, shrink_clusters, squared_distance, within};
use super::{Encoder, Learned, Quantizer, BLOCK_ROWS};
use crate::algo::kmeans::KMeans;
use crate::algo::nearest::{Centroids, Columns};
use crate::bits;
use crate::decoder::{Books, CodebookDtype, Decoder};
use crate::error::{Error, Result};
use crate::kernels::{self, Kernels};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use serde::{Deserialize, Serialize};

/// Parameters of residual quantization.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResidualQuantizer {
    n_stages: usize,
    n_bits: u32,
    beam_width: usize,
    n_refinements: usize,
    max_iter: usize,
    tol: f64,
    codebook_dtype: CodebookDtype,
}

impl Default for ResidualQuantizer {
    fn default() -> Self {
        ResidualQuantizer {
            n_stages: 8,
            n_bits: 8,
            beam_width: 8,
            n_refinements: 5,
            max_iter: 25,
            tol: 1e-4,
            codebook_dtype: CodebookDtype::Float16,
        }
    }
}

/// Codeword-codeword tables above this many bytes are not made: inner products are then taken of partial residuals.
const MAX_TABLES: usize = 512 << 20;

/// Columns that one least-squares task solves: a slice of the partial codebooks then stays in the second-level cache.
const SOLVE_COLUMNS: usize = 16;

/// Conjugate-gradient steps of one refinement; the solution starts from the codebooks at hand, so few are needed.
const SOLVE_STEPS: usize = 12;

impl ResidualQuantizer {
    fn books(&self, dim: usize, entries: usize, stages: Vec<f32>) -> Result<Decoder> {
        let group = group(dim, entries, vec![0; self.n_stages]);
        Ok(Decoder::Books(Books::new(dim, self.n_bits, self.codebook_dtype, vec![(group, stages)])?))
    }

    /// Trains the stages one after the other, each on what the best partial codes leave over.
    fn stages(&self, data: Sample, entries: usize, ctx: &Context) -> Result<(Stages, Codes, usize, usize)> {
        let dim = data.dim();
        let kmeans = KMeans { max_iter: self.max_iter, tol: self.tol, ..KMeans::new(entries) };
        let (mut stages, mut codes) = (Stages::new(dim, entries), Codes { fields: 0, values: Vec::new() });
        let (mut n_iter, mut fewest) = (0, entries);
        ctx.stage("k-means", (self.n_stages * self.max_iter) as u64);
        let mut residual = data.rows.data().to_vec();
        for number in 0..self.n_stages {
            let seeded = ctx.with_seed(ctx.seed.wrapping_add(number as u64));
            let found = kmeans.learn(Columns::from(Matrix::new(&residual, dim)?), data.weights, &seeded)?;
            n_iter = n_iter.max(found.n_iter);
            if number == 0 {
                fewest = found.distinct;
            }
            stages.push(found.centers, ctx)?;
            codes = stages.encode(data.rows, self.beam_width, ctx)?;
            if number + 1 < self.n_stages {
                stages.residuals(data.rows, &codes, &mut residual, ctx)?;
            }
        }
        Ok((stages, codes, n_iter, fewest))
    }
}

impl Quantizer for ResidualQuantizer {
    const NAME: &'static str = "residual";
    const ABOUT: &'static str = "a row is a sum of entries, one from each stage's codebook";

    fn check(&self) -> Result<()> {
        within("n_stages", self.n_stages, 1, 1 << 12)?;
        within("n_bits", self.n_bits as usize, 1, 16)?;
        within("beam_width", self.beam_width, 1, 1 << 12)?;
        within("n_refinements", self.n_refinements, 0, 1000)?;
        check_loop(self.max_iter, self.tol)
    }

    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder> {
        check_codebooks(self.n_stages.saturating_mul(dim), self.n_bits)?;
        let entries = rows.min(1 << self.n_bits);
        self.books(dim, entries, vec![0.0; self.n_stages * entries * dim])
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        check_codebooks(self.n_stages.saturating_mul(data.dim()), self.n_bits)?;
        let mut notes = Vec::new();
        let entries = shrink_clusters(1 << self.n_bits, data.len(), &mut notes);
        let (mut stages, mut codes, n_iter, distinct) = self.stages(data, entries, ctx)?;
        note_distinct(distinct, entries, &mut notes);
        ctx.stage("refine", self.n_refinements as u64);
        for _ in 0..self.n_refinements {
            stages.refine(data, &codes, ctx)?;
            let fresh = stages.encode(data.rows, self.beam_width, ctx)?;
            stages.keep_better(data.rows, &mut codes, fresh, ctx)?;
            ctx.advance(1);
        }
        let decoder = self.books(data.dim(), entries, stages.centers)?;
        let mut packed = vec![0u8; data.len() * decoder.row_bytes()];
        for (row, code) in packed.chunks_mut(decoder.row_bytes()).enumerate() {
            bits::pack(codes.row(row).iter().copied(), self.n_bits, code);
        }
        Ok(Learned { decoder, codes: Some(packed), n_iter, notes })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        let Decoder::Books(books) = decoder else {
            return Err(Error::shape("the decoder", decoder.form(), "the form books"));
        };
        let mut stages = Stages::new(books.dim(), 0);
        for (_, width, entries) in books.books() {
            stages.entries = entries.len() / width;
            stages.push(entries, ctx)?;
        }
        Ok(Box::new(move |rows: Matrix, out: &mut [u8]| {
            let mut codes = vec![0u32; rows.rows() * stages.len()];
            stages.encode_block(rows, self.beam_width, &mut codes);
            let bytes = out.len() / rows.rows();
            for (code, fields) in out.chunks_mut(bytes).zip(codes.chunks(stages.len())) {
                bits::pack(fields.iter().copied(), books.bits(), code);
            }
            Ok(())
        }))
    }
}

/// Entry numbers, `fields` of them a row.
struct Codes {
    fields: usize,
    values: Vec<u32>,
}

impl Codes {
    fn row(&self, row: usize) -> &[u32] {
        &self.values[row * self.fields..(row + 1) * self.fields]
    }
}

/// Full-width codebooks on top of each other, with what the beam search needs of them.
struct Stages {
    dim: usize,
    entries: usize,
    /// Stage after stage, entry after entry.
    centers: Vec<f32>,
    packed: Vec<Centroids>,
    half_norms: Vec<Vec<f32>>,
    /// `tables[m][i]`: inner products of stage i's entries (rows) with stage m's, i < m. Empty where too large.
    tables: Vec<Vec<Vec<f32>>>,
}

impl Stages {
    fn new(dim: usize, entries: usize) -> Self {
        Stages { dim, entries, centers: Vec::new(), packed: Vec::new(), half_norms: Vec::new(), tables: Vec::new() }
    }

    fn len(&self) -> usize {
        self.packed.len()
    }

    fn book(&self, stage: usize) -> &[f32] {
        let size = self.entries * self.dim;
        &self.centers[stage * size..(stage + 1) * size]
    }

    fn entry(&self, stage: usize, entry: u32) -> &[f32] {
        &self.book(stage)[entry as usize * self.dim..][..self.dim]
    }

    /// Whether tables between `stages` stages fit.
    fn tables_fit(&self, stages: usize) -> bool {
        stages * (stages + 1) / 2 * self.entries * self.entries * 4 <= MAX_TABLES
    }

    /// Adds a stage.
    fn push(&mut self, centers: Vec<f32>, ctx: &Context) -> Result<()> {
        let half = |c: &[f32]| (c.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / 2.0) as f32;
        self.half_norms.push(centers.chunks(self.dim).map(half).collect());
        let packed = Centroids::new(&centers, self.dim);
        let mut tables = Vec::new();
        if self.tables_fit(self.len() + 1) {
            for stage in 0..self.len() {
                let mut table = vec![0f32; self.entries * self.entries];
                let book = Matrix::new(self.book(stage), self.dim)?;
                ctx.chunks(&mut table, 64 * self.entries, |index, chunk| {
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
        self.centers.extend(centers);
        Ok(())
    }

    /// Replaces all codebooks.
    fn replace(&mut self, centers: Vec<f32>, ctx: &Context) -> Result<()> {
        let size = self.entries * self.dim;
        *self = Stages::new(self.dim, self.entries);
        centers.chunks(size).try_for_each(|book| self.push(book.to_vec(), ctx))
    }

    fn encode(&self, rows: Matrix, beam: usize, ctx: &Context) -> Result<Codes> {
        let mut values = vec![0u32; rows.rows() * self.len()];
        ctx.chunks(&mut values, BLOCK_ROWS * self.len(), |index, chunk| {
            let start = index * BLOCK_ROWS;
            self.encode_block(rows.block(start..start + chunk.len() / self.len()), beam, chunk);
            Ok(())
        })?;
        Ok(Codes { fields: self.len(), values })
    }

    /// Beam search for a block of rows on the calling thread. Rows do not influence each other.
    fn encode_block(&self, rows: Matrix, beam: usize, codes: &mut [u32]) {
        let (entries, stages) = (self.entries, self.len());
        let with_tables = self.tables_fit(stages);
        let mut search = Search::new(entries, beam, stages);
        // Inner products with all entries of all stages, for few rows at a time so that they stay in cache.
        const ROWS: usize = 16;
        let mut products = vec![0f32; if with_tables { stages * ROWS * entries } else { beam * entries }];
        let mut partial = vec![0f32; if with_tables { 0 } else { beam * self.dim }];
        for (index, codes) in codes.chunks_mut(ROWS * stages).enumerate() {
            let rows = rows.block(index * ROWS..index * ROWS + codes.len() / stages);
            if with_tables {
                for (packed, products) in self.packed.iter().zip(products.chunks_mut(ROWS * entries)) {
                    packed.dots_block(Columns::from(rows), &mut products[..rows.rows() * entries]);
                }
            }
            for (row, code) in codes.chunks_mut(stages).enumerate() {
                search.start();
                for stage in 0..stages {
                    if with_tables {
                        let own = &products[(stage * ROWS + row) * entries..][..entries];
                        search.expand_with_tables(own, &self.half_norms[stage], &self.tables[stage]);
                    } else {
                        self.expand_directly(&mut search, stage, rows.row(row), &mut partial, &mut products);
                    }
                    search.select(stage);
                }
                code.copy_from_slice(search.best());
            }
        }
    }

    /// Candidates' scores from the partial residuals themselves, where tables would not fit.
    fn expand_directly(
        &self,
        search: &mut Search,
        stage: usize,
        row: &[f32],
        partial: &mut [f32],
        products: &mut [f32],
    ) {
        let count = search.len();
        for (beam, residual) in partial.chunks_mut(self.dim).take(count).enumerate() {
            self.subtract(row, search.path(beam, stage), residual);
        }
        let residuals = Matrix::new(&partial[..count * self.dim], self.dim).expect("whole rows");
        self.packed[stage].dots_block(Columns::from(residuals), &mut products[..count * self.entries]);
        search.expand(&products[..count * self.entries], &self.half_norms[stage]);
    }

    /// What a code leaves of a row.
    fn subtract(&self, row: &[f32], code: &[u32], residual: &mut [f32]) {
        residual.copy_from_slice(row);
        for (stage, entry) in code.iter().enumerate() {
            (kernels::best().axpy)(residual, self.entry(stage, *entry), -1.0);
        }
    }

    /// What all codes leave of their rows.
    fn residuals(&self, rows: Matrix, codes: &Codes, out: &mut [f32], ctx: &Context) -> Result<()> {
        ctx.chunks(out, BLOCK_ROWS * self.dim, |index, chunk| {
            for (row, residual) in chunk.chunks_mut(self.dim).enumerate() {
                let row = index * BLOCK_ROWS + row;
                self.subtract(rows.row(row), codes.row(row), residual);
            }
            Ok(())
        })
    }

    /// Takes `fresh` codes in rows where they have less error.
    fn keep_better(&self, rows: Matrix, codes: &mut Codes, fresh: Codes, ctx: &Context) -> Result<()> {
        let fields = codes.fields;
        ctx.chunks(&mut codes.values, BLOCK_ROWS * fields, |index, chunk| {
            let mut residual = vec![0f32; self.dim];
            let zero = vec![0f32; self.dim];
            let mut error = |row: usize, code: &[u32]| {
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

    /// All codebooks together by least squares for given codes: conjugate gradients from the codebooks at hand, which
    /// never raise the error, leave unused entries alone and need no system of (stages x entries)^2 numbers.
    fn refine(&mut self, data: Sample, codes: &Codes, ctx: &Context) -> Result<()> {
        let counts = self.counts(data, codes);
        let slices = ctx.map(self.dim.div_ceil(SOLVE_COLUMNS), |slice| {
            let start = slice * SOLVE_COLUMNS;
            let width = SOLVE_COLUMNS.min(self.dim - start);
            Solver::new(self, data, codes, &counts, start, width).solve(ctx)
        })?;
        let mut centers = vec![0f32; self.centers.len()];
        for (slice, values) in slices.iter().enumerate() {
            let start = slice * SOLVE_COLUMNS;
            let width = SOLVE_COLUMNS.min(self.dim - start);
            for (entry, part) in centers.chunks_mut(self.dim).zip(values.chunks(width)) {
                entry[start..start + width].copy_from_slice(part);
            }
        }
        self.replace(centers, ctx)
    }

    /// Weight of each entry's rows.
    fn counts(&self, data: Sample, codes: &Codes) -> Vec<f32> {
        let mut counts = vec![0f64; self.len() * self.entries];
        for row in 0..data.len() {
            for (stage, entry) in codes.row(row).iter().enumerate() {
                counts[stage * self.entries + *entry as usize] += data.weight(row);
            }
        }
        counts.into_iter().map(|c| c as f32).collect()
    }
}

/// Partial codes of one row.
struct Search {
    entries: usize,
    beam: usize,
    stages: usize,
    /// Scores and codes of the partial codes; a score is half the squared error, the row's own norm left out.
    scores: Vec<f32>,
    paths: Vec<u32>,
    next_scores: Vec<f32>,
    next_paths: Vec<u32>,
    candidates: Vec<f32>,
    found: Vec<(f32, u32)>,
    kernels: &'static Kernels,
}

/// Candidates are looked at in runs of this many.
const RUN: usize = 32;

impl Search {
    fn new(entries: usize, beam: usize, stages: usize) -> Self {
        Search {
            entries,
            beam,
            stages,
            scores: Vec::with_capacity(beam),
            paths: vec![0; beam * stages],
            next_scores: Vec::with_capacity(beam),
            next_paths: vec![0; beam * stages],
            candidates: Vec::with_capacity(beam * entries),
            found: Vec::new(),
            kernels: kernels::best(),
        }
    }

    fn start(&mut self) {
        self.scores.clear();
        self.scores.push(0.0);
    }

    fn len(&self) -> usize {
        self.scores.len()
    }

    fn path(&self, beam: usize, stage: usize) -> &[u32] {
        &self.paths[beam * self.stages..][..stage]
    }

    fn best(&self) -> &[u32] {
        &self.paths[..self.stages]
    }

    /// Scores of all continuations: score + half norm - product + what the entries share with those chosen before.
    fn expand_with_tables(&mut self, products: &[f32], half_norms: &[f32], tables: &[Vec<f32>]) {
        self.candidates.resize(self.len() * self.entries, 0.0);
        for (beam, out) in self.candidates.chunks_mut(self.entries).enumerate() {
            for ((value, half), product) in out.iter_mut().zip(half_norms).zip(products) {
                *value = self.scores[beam] + half - product;
            }
            for (table, chosen) in tables.iter().zip(&self.paths[beam * self.stages..]) {
                (self.kernels.add)(out, &table[*chosen as usize * self.entries..][..self.entries]);
            }
        }
    }

    /// The same from products with the partial residuals, which need no tables.
    fn expand(&mut self, products: &[f32], half_norms: &[f32]) {
        self.candidates.clear();
        for (score, products) in self.scores.iter().zip(products.chunks(self.entries)) {
            self.candidates.extend(half_norms.iter().zip(products).map(|(half, product)| score + half - product));
        }
    }

    /// Keeps the best continuations, best first; ties go to the lower number.
    fn select(&mut self, stage: usize) {
        let keep = self.beam.min(self.candidates.len());
        let threshold = self.threshold(keep);
        self.found.clear();
        for (run, values) in self.candidates.chunks(RUN).enumerate() {
            if values.iter().fold(f32::INFINITY, |least, v| if *v < least { *v } else { least }) > threshold {
                continue;
            }
            let near = values.iter().enumerate().filter(|(_, v)| **v <= threshold);
            self.found.extend(near.map(|(place, v)| (*v, (run * RUN + place) as u32)));
        }
        self.found.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        self.next_scores.clear();
        for (place, (score, candidate)) in self.found.iter().take(keep).enumerate() {
            let (beam, entry) = (*candidate as usize / self.entries, *candidate % self.entries as u32);
            let path = &mut self.next_paths[place * self.stages..][..stage + 1];
            path[..stage].copy_from_slice(&self.paths[beam * self.stages..][..stage]);
            path[stage] = entry;
            self.next_scores.push(*score);
        }
        std::mem::swap(&mut self.scores, &mut self.next_scores);
        std::mem::swap(&mut self.paths, &mut self.next_paths);
    }

    /// A score that at least `keep` candidates reach, and few more: the `keep`-th smallest minimum of many lanes.
    fn threshold(&self, keep: usize) -> f32 {
        let lanes = (keep * 8).clamp(RUN, 1024);
        if keep > lanes || self.candidates.len() < 2 * lanes {
            return f32::INFINITY;
        }
        let mut least = vec![f32::INFINITY; lanes];
        for values in self.candidates.chunks(lanes) {
            for (least, value) in least.iter_mut().zip(values) {
                *least = if *value < *least { *value } else { *least };
            }
        }
        *least.select_nth_unstable_by(keep.min(lanes) - 1, f32::total_cmp).1
    }
}

/// Least squares for a slice of columns: min over the codebooks C of sum_i w_i |x_i - sum_m C_m[a_im]|^2.
struct Solver<'a> {
    stages: &'a Stages,
    data: Sample<'a>,
    codes: &'a Codes,
    counts: &'a [f32],
    width: usize,
    /// The slice of the codebooks: stages x entries x width.
    centers: Vec<f32>,
    /// What the codes leave of the rows' slices.
    residual: Vec<f32>,
}

impl<'a> Solver<'a> {
    fn new(
        stages: &'a Stages,
        data: Sample<'a>,
        codes: &'a Codes,
        counts: &'a [f32],
        start: usize,
        width: usize,
    ) -> Self {
        let slice = |row: &[f32]| row[start..start + width].to_vec();
        let centers: Vec<f32> = stages.centers.chunks(stages.dim).flat_map(slice).collect();
        let residual: Vec<f32> = data.rows.data().chunks(stages.dim).flat_map(slice).collect();
        let mut solver = Solver { stages, data, codes, counts, width, centers, residual };
        let mut image = vec![0f32; solver.residual.len()];
        solver.apply(&solver.centers, &mut image);
        solver.residual.iter_mut().zip(&image).for_each(|(r, v)| *r -= v);
        solver
    }

    /// A row's sum of entries, for all rows.
    fn apply(&self, centers: &[f32], out: &mut [f32]) {
        let (width, entries) = (self.width, self.stages.entries);
        for (row, out) in out.chunks_mut(width).enumerate() {
            out.fill(0.0);
            for (stage, entry) in self.codes.row(row).iter().enumerate() {
                let from = (stage * entries + *entry as usize) * width;
                out.iter_mut().zip(&centers[from..from + width]).for_each(|(o, c)| *o += c);
            }
        }
    }

    /// Each entry's weighted sum of its rows.
    fn transpose(&self, rows: &[f32]) -> Vec<f32> {
        let (width, entries) = (self.width, self.stages.entries);
        let mut out = vec![0f32; self.centers.len()];
        for (row, values) in rows.chunks(width).enumerate() {
            let weight = self.data.weight(row) as f32;
            for (stage, entry) in self.codes.row(row).iter().enumerate() {
                let from = (stage * entries + *entry as usize) * width;
                out[from..from + width].iter_mut().zip(values).for_each(|(o, v)| *o += weight * v);
            }
        }
        out
    }

    /// The gradient over the entries' counts: conjugate gradients preconditioned by the diagonal.
    fn precondition(&self, gradient: &[f32]) -> Vec<f32> {
        let mut out = gradient.to_vec();
        for (values, count) in out.chunks_mut(self.width).zip(self.counts) {
            values.iter_mut().for_each(|v| *v = if *count > 0.0 { *v / count } else { 0.0 });
        }
        out
    }

    /// Inner products of the columns.
    fn dots(&self, a: &[f32], b: &[f32]) -> Vec<f64> {
        let mut sums = vec![0f64; self.width];
        for (a, b) in a.chunks(self.width).zip(b.chunks(self.width)) {
            sums.iter_mut().zip(a.iter().zip(b)).for_each(|(s, (a, b))| *s += f64::from(*a) * f64::from(*b));
        }
        sums
    }

    /// Weighted squared norms of the columns of rows.
    fn energies(&self, rows: &[f32]) -> Vec<f64> {
        let mut sums = vec![0f64; self.width];
        for (row, values) in rows.chunks(self.width).enumerate() {
            let weight = self.data.weight(row);
            sums.iter_mut().zip(values).for_each(|(s, v)| *s += weight * f64::from(*v) * f64::from(*v));
        }
        sums
    }

    fn solve(mut self, ctx: &Context) -> Result<Vec<f32>> {
        let width = self.width;
        let (before, start) = (self.energies(&self.residual), self.centers.clone());
        let mut gradient = self.transpose(&self.residual);
        let mut scaled = self.precondition(&gradient);
        let mut direction = scaled.clone();
        let mut slope = self.dots(&gradient, &scaled);
        // A gradient this far below the first one is float32's rounding: steps along it would only add noise.
        let settled: Vec<f64> = slope.iter().map(|s| s * 1e-8).collect();
        let mut image = vec![0f32; self.residual.len()];
        for _ in 0..SOLVE_STEPS {
            ctx.check()?;
            self.apply(&direction, &mut image);
            let curvature = self.energies(&image);
            let step = |column: usize| match slope[column] > settled[column] && curvature[column] > 0.0 {
                true => (slope[column] / curvature[column]) as f32,
                false => 0.0,
            };
            let steps: Vec<f32> = (0..width).map(step).collect();
            let along = |out: &mut [f32], by: &[f32], sign: f32| {
                for (out, by) in out.chunks_mut(width).zip(by.chunks(width)) {
                    out.iter_mut().zip(by.iter().zip(&steps)).for_each(|(o, (v, step))| *o += sign * step * v);
                }
            };
            along(&mut self.centers, &direction, 1.0);
            along(&mut self.residual, &image, -1.0);
            gradient = self.transpose(&self.residual);
            scaled = self.precondition(&gradient);
            let next = self.dots(&gradient, &scaled);
            let ratio: Vec<f32> =
                next.iter().zip(&slope).map(|(n, s)| if *s > 0.0 { (n / s) as f32 } else { 0.0 }).collect();
            for (direction, scaled) in direction.chunks_mut(width).zip(scaled.chunks(width)) {
                direction.iter_mut().zip(scaled.iter().zip(&ratio)).for_each(|(d, (z, r))| *d = z + r * *d);
            }
            slope = next;
        }
        self.restore_worse_columns(&start, &before);
        Ok(self.centers)
    }

    /// Puts back columns whose error rose, by rounding alone, against the codebooks that the solution started from.
    fn restore_worse_columns(&mut self, start: &[f32], before: &[f64]) {
        let after = self.energies(&self.residual);
        for (center, start) in self.centers.chunks_mut(self.width).zip(start.chunks(self.width)) {
            for column in 0..center.len() {
                if after[column] > before[column] {
                    center[column] = start[column];
                }
            }
        }
    }
}
