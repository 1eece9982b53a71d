//! All codebooks together, for given codes: least squares by conjugate gradients.

use super::beam::{Codes, Stages};
use crate::error::Result;
use crate::matrix::Sample;
use crate::pool::Context;

/// Columns that one least-squares task solves: a slice of the partial codebooks then stays in the second-level cache.
const SOLVE_COLUMNS: usize = 16;

/// Conjugate-gradient steps of one refinement; the solution starts from the codebooks at hand, so few are needed.
const SOLVE_STEPS: usize = 12;

impl Stages {
    /// All codebooks together by least squares for given codes: conjugate gradients from the codebooks at hand, which
    /// never raise the error, leave unused entries alone and need no system of (stages x entries)^2 numbers.
    pub(super) fn refine(&mut self, data: Sample, codes: &Codes, ctx: &Context) -> Result<()> {
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
