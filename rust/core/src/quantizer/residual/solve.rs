//! All codebooks together, for given codes: least squares by conjugate gradients.

use super::beam::{Codes, Stages};
use crate::error::{product, room, zeros, Result};
use crate::matrix::Sample;
use crate::pool::Context;

/// Columns that one least-squares task solves: a slice of the codebooks then stays in the second-level cache.
const COLUMNS: usize = 16;

/// One row's or entry's values in the columns of a task; zeros where there are fewer.
type Slice = [f32; COLUMNS];

/// Conjugate-gradient steps of one refinement; the solution starts from the codebooks at hand, so few are needed.
const STEPS: usize = 12;

/// Rows between two looks at the context.
const ROWS: usize = 1 << 14;

impl Stages {
    /// All codebooks together by least squares for given codes: conjugate gradients from the codebooks at hand, which
    /// never raise the error, leave unused entries alone and need no system of (stages x entries)^2 numbers.
    pub(in crate::quantizer) fn refine(&mut self, data: Sample, codes: &Codes, ctx: &Context) -> Result<()> {
        let centers = self.refined(&self.centers, STEPS, data, codes, ctx)?;
        self.replace(centers, ctx)
    }

    /// What [`Stages::refine`] makes of codebooks `from`, which need not be those at hand, in so many steps.
    pub(in crate::quantizer) fn refined(
        &self,
        from: &[f32],
        steps: usize,
        data: Sample,
        codes: &Codes,
        ctx: &Context,
    ) -> Result<Vec<f32>> {
        // Relative to the largest, weights of any magnitude are good numbers in float32.
        let largest = data.weights.map_or(1.0, |weights| weights.iter().fold(0.0, |a: f64, b| a.max(*b)));
        room("a least squares fit", &[product(&[data.len(), 4])])?;
        let weights: Vec<f32> = (0..data.len()).map(|row| (data.weight(row) / largest) as f32).collect();
        let counts = self.counts(&weights, codes);
        let slices = ctx.map(self.dim.div_ceil(COLUMNS), |slice| {
            let start = slice * COLUMNS;
            let width = COLUMNS.min(self.dim - start);
            Solver { stages: self, from, steps, data, weights: &weights, codes, counts: &counts, start, width }
                .solve(ctx)
        })?;
        let mut centers: Vec<f32> = zeros("the codebooks", Some(from.len()))?;
        for (slice, values) in slices.iter().enumerate() {
            for (entry, values) in centers.chunks_mut(self.dim).zip(values) {
                entry[slice * COLUMNS..].iter_mut().zip(values).for_each(|(center, value)| *center = *value);
            }
        }
        Ok(centers)
    }

    /// Weight of each entry's rows.
    fn counts(&self, weights: &[f32], codes: &Codes) -> Vec<f32> {
        let mut counts = vec![0f64; self.len() * self.entries];
        for (row, weight) in weights.iter().enumerate() {
            for (stage, entry) in codes.row(row).iter().enumerate() {
                counts[stage * self.entries + usize::from(*entry)] += f64::from(*weight);
            }
        }
        counts.into_iter().map(|c| c as f32).collect()
    }
}

/// Entries may be so many times as large as the largest value of their column.
const FARTHEST: f32 = 4.0;

/// Least squares for a slice of columns: min over the codebooks C of sum_i w_i |x_i - sum_m C_m[a_im]|^2.
struct Solver<'a> {
    stages: &'a Stages,
    from: &'a [f32],
    steps: usize,
    data: Sample<'a>,
    weights: &'a [f32],
    codes: &'a Codes,
    counts: &'a [f32],
    start: usize,
    width: usize,
}

impl Solver<'_> {
    /// `values` of `dim` columns in the columns of this task.
    fn slice(&self, values: &[f32]) -> Slice {
        let mut slice = [0.0; COLUMNS];
        slice[..self.width].copy_from_slice(&values[self.start..self.start + self.width]);
        slice
    }

    /// Sums entries for each row by its code; `from_data`: what these sums leave of the rows. Gives each entry's
    /// weighted sum of its rows' results, and the weighted squared norms of the columns of all results.
    fn pass(&self, entries: &[Slice], from_data: bool, ctx: &Context) -> Result<(Vec<Slice>, [f64; COLUMNS])> {
        let (mut sums, mut energies) = (vec![[0f32; COLUMNS]; entries.len()], [0f64; COLUMNS]);
        for (row, weight) in self.weights.iter().enumerate() {
            if row % ROWS == 0 {
                ctx.check()?;
            }
            let places = || {
                let code = self.codes.row(row).iter().enumerate();
                code.map(|(stage, entry)| stage * self.stages.entries + usize::from(*entry))
            };
            let mut values = [0f32; COLUMNS];
            for place in places() {
                let entry = &entries[place];
                (0..COLUMNS).for_each(|t| values[t] += entry[t]);
            }
            if from_data {
                let row = self.slice(self.data.rows.row(row));
                (0..COLUMNS).for_each(|t| values[t] = row[t] - values[t]);
            }
            let mut weighted = [0f32; COLUMNS];
            (0..COLUMNS).for_each(|t| weighted[t] = weight * values[t]);
            for place in places() {
                let sum = &mut sums[place];
                (0..COLUMNS).for_each(|t| sum[t] += weighted[t]);
            }
            (0..COLUMNS).for_each(|t| energies[t] += f64::from(weighted[t]) * f64::from(values[t]));
        }
        Ok((sums, energies))
    }

    /// The gradient over the entries' counts: conjugate gradients preconditioned by the diagonal.
    fn precondition(&self, gradient: &[Slice]) -> Vec<Slice> {
        let over = |(values, count): (&Slice, &f32)| match *count > 0.0 {
            true => values.map(|value| value / count),
            false => [0.0; COLUMNS],
        };
        gradient.iter().zip(self.counts).map(over).collect()
    }

    fn solve(&self, ctx: &Context) -> Result<Vec<Slice>> {
        let start: Vec<Slice> = self.from.chunks(self.stages.dim).map(|entry| self.slice(entry)).collect();
        let mut centers = start.clone();
        let (mut gradient, before) = self.pass(&centers, true, ctx)?;
        let mut direction = self.precondition(&gradient);
        let mut slope = dots(&gradient, &direction);
        // A gradient this far below the first one is float32's rounding: steps along it would only add noise.
        let settled = slope.map(|slope| slope * 1e-8);
        for _ in 0..self.steps {
            let (product, curvature) = self.pass(&direction, false, ctx)?;
            let step = std::array::from_fn(|t| match slope[t] > settled[t] && curvature[t] > 0.0 {
                true => (slope[t] / curvature[t]) as f32,
                false => 0.0,
            });
            add(&mut centers, &direction, step);
            add(&mut gradient, &product, step.map(|step| -step));
            let scaled = self.precondition(&gradient);
            let next = dots(&gradient, &scaled);
            let ratio: Slice = std::array::from_fn(|t| if slope[t] > 0.0 { (next[t] / slope[t]) as f32 } else { 0.0 });
            for (direction, scaled) in direction.iter_mut().zip(&scaled) {
                (0..COLUMNS).for_each(|t| direction[t] = scaled[t] + ratio[t] * direction[t]);
            }
            slope = next;
        }
        // Columns whose error did not fall, by rounding alone, keep the entries that they started from. So do columns whose
        // entries left the data far behind, which only their differences would make up for: where stages repeat each
        // other nothing else holds their sizes.
        let (_, after) = self.pass(&centers, true, ctx)?;
        let mut limit = [0f32; COLUMNS];
        for row in 0..self.weights.len() {
            let row = self.slice(self.data.rows.row(row));
            (0..COLUMNS).for_each(|t| limit[t] = limit[t].max(FARTHEST * row[t].abs()));
        }
        let near = |t: usize| centers.iter().all(|center| center[t].abs() <= limit[t]);
        let kept: [bool; COLUMNS] = std::array::from_fn(|t| after[t] <= before[t] && near(t));
        for (center, start) in centers.iter_mut().zip(&start) {
            for t in 0..COLUMNS {
                if !kept[t] {
                    center[t] = start[t];
                }
            }
        }
        Ok(centers)
    }
}

/// out + step * by, column by column.
fn add(out: &mut [Slice], by: &[Slice], step: Slice) {
    for (out, by) in out.iter_mut().zip(by) {
        (0..COLUMNS).for_each(|t| out[t] += step[t] * by[t]);
    }
}

/// Inner products of the columns.
fn dots(a: &[Slice], b: &[Slice]) -> [f64; COLUMNS] {
    let mut sums = [0f64; COLUMNS];
    for (a, b) in a.iter().zip(b) {
        (0..COLUMNS).for_each(|t| sums[t] += f64::from(a[t]) * f64::from(b[t]));
    }
    sums
}
