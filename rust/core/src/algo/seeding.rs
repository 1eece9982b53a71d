//! First centres for k-means.

use super::kmeans::Rows;
use super::nearest::{Centroids, Columns};
use crate::error::Result;
use crate::pool::Context;
use crate::rng::Rng;
use std::collections::HashSet;

/// Multiply-adds up to which each centre of k-means++ is the best of several draws.
const GREEDY_WORK: usize = 2_000_000_000;

/// Rows per centre that seeding looks at, where each centre is the best of several draws and where it is not: with more
/// of them seeding would take longer than Lloyd's iterations, and those would end no better.
const GREEDY_ROWS: usize = 128;
const SEED_ROWS: usize = 32;

/// Centres are drawn in this many rounds where they are not the best of several draws: seeding then costs as much as one
/// iteration on the same rows.
const ROUNDS: usize = 16;

/// Rows whose weights are summed together; sums of blocks are added in order. Short, because a draw looks through one.
const BLOCK: usize = 512;

/// k-means++ (Arthur and Vassilvitskii, 2007): each centre is a row drawn in proportion to its squared distance to the
/// centres so far. Fewer than `count` centres come back only if the rows have fewer distinct values.
///
/// Small problems use the greedy form of scikit-learn. Large ones draw several centres a round, as k-means|| does
/// (Bahmani et al., 2012). Both look at a sub-sample.
pub(super) fn plus_plus(rows: &Rows, count: usize, rng: &mut Rng, ctx: &Context) -> Result<Vec<f32>> {
    let (n, width) = (rows.x.rows(), rows.x.width());
    match n.min(count.saturating_mul(GREEDY_ROWS)).saturating_mul(count).saturating_mul(width) <= GREEDY_WORK {
        true => from_sample(rows, count, GREEDY_ROWS, rng, ctx, greedy),
        false => in_rounds(rows, count, rng, ctx),
    }
}

/// Several centres a round.
pub(super) fn in_rounds(rows: &Rows, count: usize, rng: &mut Rng, ctx: &Context) -> Result<Vec<f32>> {
    from_sample(rows, count, SEED_ROWS, rng, ctx, |rows, count, rng, ctx| rounds(rows, count, Vec::new(), rng, ctx))
}

/// Seeding from a sub-sample; from all rows only if that has too few distinct ones.
fn from_sample(
    rows: &Rows,
    count: usize,
    rows_per_center: usize,
    rng: &mut Rng,
    ctx: &Context,
    seed: impl Fn(&Rows, usize, &mut Rng, &Context) -> Result<Vec<f32>>,
) -> Result<Vec<f32>> {
    let size = count.saturating_mul(rows_per_center);
    if rows.x.rows() <= size {
        return seed(rows, count, rng, ctx);
    }
    let sample = rows.gather(&rng.sample(rows.x.rows(), size), ctx)?;
    let centers = seed(&sample.rows(), count, rng, ctx)?;
    filled_up(rows, count, centers, rng, ctx)
}

/// Each centre is the best of several draws.
fn greedy(rows: &Rows, count: usize, rng: &mut Rng, ctx: &Context) -> Result<Vec<f32>> {
    let trials = 2 + (count as f64).ln() as usize;
    let blocks = packed_blocks(rows, ctx)?;
    let mut seeding = Seeding::new(rows, ctx)?;
    seeding.add_first(rng)?;
    while seeding.len() < count && seeding.total() > 0.0 {
        let drawn: Vec<usize> = (0..trials).map(|_| seeding.draw(rng)).collect();
        seeding.add_best(&drawn, &blocks)?;
    }
    Ok(seeding.centers)
}

/// All rows as the many sides of comparisons, [`BLOCK`] at a time: few candidates would not fill vectors.
fn packed_blocks(rows: &Rows, ctx: &Context) -> Result<Vec<Centroids>> {
    let (n, width) = (rows.x.rows(), rows.x.width());
    let block = |number: usize| {
        let range = number * BLOCK..n.min((number + 1) * BLOCK);
        let values: Vec<f32> = range.flat_map(|row| rows.x.row(row)).copied().collect();
        Ok(Centroids::new(&values, width))
    };
    ctx.map(n.div_ceil(BLOCK), block)
}

/// Draws several centres at a time after those that exist already.
fn rounds(rows: &Rows, count: usize, centers: Vec<f32>, rng: &mut Rng, ctx: &Context) -> Result<Vec<f32>> {
    let batch = count.div_ceil(ROUNDS);
    let mut seeding = Seeding::new(rows, ctx)?;
    if centers.is_empty() {
        seeding.add_first(rng)?;
    } else {
        seeding.add(&centers)?;
    }
    while seeding.len() < count && seeding.total() > 0.0 {
        let mut values = Vec::new();
        let mut seen = HashSet::new();
        for _ in 0..batch.min(count - seeding.len()) {
            let row = rows.x.row(seeding.draw(rng));
            if seen.insert(key(row)) {
                values.extend_from_slice(row);
            }
        }
        seeding.add(&values)?;
    }
    Ok(seeding.centers)
}

/// `count` different rows in random order, the heavier the earlier; fewer if there are fewer distinct rows.
pub(super) fn random(rows: &Rows, count: usize, rng: &mut Rng, ctx: &Context) -> Result<Vec<f32>> {
    // The order of exponential times with the weights as rates is a draw without replacement.
    let mut times = Vec::new();
    for row in 0..rows.x.rows() {
        look(row, ctx)?;
        let time = -(1.0 - rng.uniform()).ln() / rows.pull(row);
        if time.is_finite() {
            times.push((time, row));
        }
    }
    times.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut seen = HashSet::new();
    let mut centers = Vec::new();
    for (number, (_, row)) in times.into_iter().enumerate() {
        look(number, ctx)?;
        let row = rows.x.row(row);
        if seen.len() < count && seen.insert(key(row)) {
            centers.extend_from_slice(row);
        }
    }
    if centers.is_empty() {
        // No row pulls: any will do.
        centers.extend_from_slice(rows.x.row(0));
    }
    Ok(centers)
}

/// Whether more than `count` rows differ from each other. Rows of most tables tell after `count + 1` of them.
pub(super) fn more_distinct_than(rows: &Rows, count: usize, ctx: &Context) -> Result<bool> {
    let mut seen = HashSet::new();
    for row in 0..rows.x.rows() {
        look(row, ctx)?;
        if seen.insert(key(rows.x.row(row))) && seen.len() > count {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Fails now and then if the caller asked to stop: for loops over single rows.
fn look(row: usize, ctx: &Context) -> Result<()> {
    if row.is_multiple_of(1 << 14) {
        ctx.check()?;
    }
    Ok(())
}

/// `centers` and, if they are fewer than `count`, others drawn far from them.
pub(super) fn filled_up(
    rows: &Rows,
    count: usize,
    centers: Vec<f32>,
    rng: &mut Rng,
    ctx: &Context,
) -> Result<Vec<f32>> {
    if centers.len() == count * rows.x.width() {
        return Ok(centers);
    }
    rounds(rows, count, centers, rng, ctx)
}

/// Equal for equal rows; 0 and -0 are equal.
fn key(row: &[f32]) -> Vec<u32> {
    row.iter().map(|v| (v + 0.0).to_bits()).collect()
}

/// The centres so far, and how far each row is from the nearest of them.
struct Seeding<'a> {
    rows: &'a Rows<'a>,
    ctx: &'a Context,
    centers: Vec<f32>,
    /// Squared distances.
    far: Vec<f32>,
    /// Sums over blocks of weight times squared distance.
    sums: Vec<f64>,
}

impl<'a> Seeding<'a> {
    /// No centres: rows are drawn by weight alone.
    fn new(rows: &'a Rows, ctx: &'a Context) -> Result<Self> {
        let far = vec![1.0; rows.x.rows()];
        let mut seeding = Seeding { rows, ctx, centers: Vec::new(), far, sums: Vec::new() };
        seeding.sum()?;
        Ok(seeding)
    }

    fn len(&self) -> usize {
        self.centers.len() / self.rows.x.width()
    }

    fn total(&self) -> f64 {
        self.sums.iter().sum()
    }

    fn sum(&mut self) -> Result<()> {
        let block = |number: usize| {
            let range = number * BLOCK..self.far.len().min((number + 1) * BLOCK);
            Ok(range.map(|row| self.mass(row)).sum())
        };
        self.sums = self.ctx.map(self.far.len().div_ceil(BLOCK), block)?;
        Ok(())
    }

    fn mass(&self, row: usize) -> f64 {
        self.rows.pull(row) * f64::from(self.far[row])
    }

    /// A row in proportion to its mass.
    fn draw(&self, rng: &mut Rng) -> usize {
        let mut left = rng.uniform() * self.total();
        let mut last = 0;
        for (number, sum) in self.sums.iter().enumerate() {
            if left >= *sum {
                left -= sum;
                continue;
            }
            for row in number * BLOCK..self.far.len().min((number + 1) * BLOCK) {
                let mass = self.mass(row);
                if mass > 0.0 {
                    last = row;
                    if left < mass {
                        return row;
                    }
                }
                left -= mass;
            }
        }
        // Rounding can leave a rest behind the last row of positive mass.
        if self.mass(last) > 0.0 {
            return last;
        }
        (0..self.far.len()).rev().find(|row| self.mass(*row) > 0.0).unwrap_or(0)
    }

    fn add_first(&mut self, rng: &mut Rng) -> Result<()> {
        let row = self.draw(rng);
        self.far.fill(f32::INFINITY);
        self.add(self.rows.x.row(row))
    }

    /// Adds centres that the caller chose.
    fn add(&mut self, values: &[f32]) -> Result<()> {
        if self.centers.is_empty() {
            self.far.fill(f32::INFINITY);
        }
        let (x, n) = (self.rows.x, self.far.len());
        let (mut labels, mut distances) = (vec![0; n], vec![0.0; n]);
        // Exact, so that a row equal to a centre is at distance 0 and never drawn.
        Centroids::new(values, x.width()).nearest_exact(x, &mut labels, Some(&mut distances), self.ctx)?;
        self.lower(|row| distances[row])?;
        self.centers.extend_from_slice(values);
        Ok(())
    }

    /// Adds the candidate that brings the rows nearest; the first of equals. `blocks`: see [`packed_blocks`].
    fn add_best(&mut self, candidates: &[usize], blocks: &[Centroids]) -> Result<()> {
        let (x, n, trials) = (self.rows.x, self.far.len(), candidates.len());
        let values: Vec<f32> = candidates.iter().flat_map(|row| x.row(*row)).copied().collect();
        let candidate_rows = Columns::contiguous(&values, x.width());
        let block = |number: usize| {
            let first = number * BLOCK;
            let far = &self.far[first..n.min(first + BLOCK)];
            let mut distances = vec![0.0; far.len() * trials];
            blocks[number].distances_block(candidate_rows, &mut distances);
            let mass = |row: usize, distance: f32| self.rows.pull(first + row) * f64::from(distance.min(far[row]));
            let potential = |distances: &[f32]| {
                // Several running sums, because one would wait for each addition.
                let mut sums = [0.0; 4];
                distances.iter().enumerate().for_each(|(row, distance)| sums[row % 4] += mass(row, *distance));
                sums.iter().sum::<f64>()
            };
            let potentials: Vec<f64> = distances.chunks_exact(far.len()).map(potential).collect();
            Ok((distances, potentials))
        };
        let parts = self.ctx.map(blocks.len(), block)?;
        let potential = |trial: usize| parts.iter().map(|part| part.1[trial]).sum::<f64>();
        let best = (0..trials).min_by(|a, b| potential(*a).total_cmp(&potential(*b))).unwrap_or(0);
        for (far, (distances, _)) in self.far.chunks_mut(BLOCK).zip(&parts) {
            let nearer = &distances[best * far.len()..];
            far.iter_mut().zip(nearer).for_each(|(far, distance)| *far = far.min(*distance));
        }
        self.sums = parts.iter().map(|part| part.1[best]).collect();
        self.centers.extend_from_slice(x.row(candidates[best]));
        Ok(())
    }

    fn lower(&mut self, distance: impl Fn(usize) -> f32) -> Result<()> {
        for (row, far) in self.far.iter_mut().enumerate() {
            *far = far.min(distance(row));
        }
        self.sum()
    }
}
