//! First centres for k-means.

use super::kmeans::Rows;
use super::nearest::Centroids;
use crate::error::Result;
use crate::pool::Context;
use crate::rng::Rng;
use std::collections::HashSet;

/// Multiply-adds up to which each centre of k-means++ is the best of several draws over all rows.
const GREEDY_WORK: usize = 2_000_000_000;

/// Rows per centre that seeding looks at beyond that.
const SEED_ROWS: usize = 32;

/// Centres are drawn in this many rounds beyond that: seeding then costs as much as one iteration on the same rows.
const ROUNDS: usize = 16;

/// Rows whose weights are summed together; sums of blocks are added in order.
const BLOCK: usize = 4096;

/// k-means++ (Arthur and Vassilvitskii, 2007): each centre is a row drawn in proportion to its squared distance to the
/// centres so far. Fewer than `count` centres come back only if the rows have fewer distinct values.
///
/// Small problems use the greedy form of scikit-learn. Large ones look at a sub-sample and draw several centres a round,
/// as k-means|| does (Bahmani et al., 2012).
pub(super) fn plus_plus(rows: &Rows, count: usize, rng: &mut Rng, ctx: &Context) -> Result<Vec<f32>> {
    let (n, width) = (rows.x.rows(), rows.x.width());
    if n.saturating_mul(count).saturating_mul(width) <= GREEDY_WORK {
        return greedy(rows, count, rng, ctx);
    }
    in_rounds(rows, count, rng, ctx)
}

/// Seeding from a sub-sample; from all rows only if that has too few distinct ones.
pub(super) fn in_rounds(rows: &Rows, count: usize, rng: &mut Rng, ctx: &Context) -> Result<Vec<f32>> {
    let (n, width) = (rows.x.rows(), rows.x.width());
    let batch = count.div_ceil(ROUNDS);
    let sample = rng.sample(n, count.saturating_mul(SEED_ROWS));
    let owned = rows.gather(&sample);
    let centers = rounds(&owned.rows(), count, batch, Vec::new(), rng, ctx)?;
    if centers.len() == count * width || sample.len() == n {
        return Ok(centers);
    }
    rounds(rows, count, batch, centers, rng, ctx)
}

fn greedy(rows: &Rows, count: usize, rng: &mut Rng, ctx: &Context) -> Result<Vec<f32>> {
    let trials = 2 + (count as f64).ln() as usize;
    let mut seeding = Seeding::new(rows, ctx)?;
    seeding.add_first(rng)?;
    while seeding.len() < count && seeding.total() > 0.0 {
        let drawn: Vec<usize> = (0..trials).map(|_| seeding.draw(rng)).collect();
        seeding.add_best(&drawn)?;
    }
    Ok(seeding.centers)
}

/// Draws up to `batch` centres at a time after those that exist already.
fn rounds(
    rows: &Rows,
    count: usize,
    batch: usize,
    centers: Vec<f32>,
    rng: &mut Rng,
    ctx: &Context,
) -> Result<Vec<f32>> {
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
pub(super) fn random(rows: &Rows, count: usize, rng: &mut Rng) -> Vec<f32> {
    // The order of exponential times with the weights as rates is a draw without replacement.
    let mut times = Vec::new();
    for row in 0..rows.x.rows() {
        let time = -(1.0 - rng.uniform()).ln() / rows.pull(row);
        if time.is_finite() {
            times.push((time, row));
        }
    }
    times.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut seen = HashSet::new();
    let mut centers = Vec::new();
    for (_, row) in times {
        let row = rows.x.row(row);
        if seen.len() < count && seen.insert(key(row)) {
            centers.extend_from_slice(row);
        }
    }
    if centers.is_empty() {
        // No row pulls: any will do.
        centers.extend_from_slice(rows.x.row(0));
    }
    centers
}

/// Whether more than `count` rows differ from each other. Rows of most tables tell after `count + 1` of them.
pub(super) fn more_distinct_than(rows: &Rows, count: usize) -> bool {
    let mut seen = HashSet::new();
    (0..rows.x.rows()).any(|row| seen.insert(key(rows.x.row(row))) && seen.len() > count)
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
    rounds(rows, count, count.div_ceil(ROUNDS), centers, rng, ctx)
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

    /// Adds the candidate that brings the rows nearest; the first of equals.
    fn add_best(&mut self, candidates: &[usize]) -> Result<()> {
        let (x, trials) = (self.rows.x, candidates.len());
        let values: Vec<f32> = candidates.iter().flat_map(|row| x.row(*row)).copied().collect();
        let centroids = Centroids::new(&values, x.width());
        let mut distances = vec![0.0; x.rows() * trials];
        self.ctx.chunks(&mut distances, BLOCK * trials, |block, out| {
            let first = block * BLOCK;
            centroids.distances_block(x.block(first..first + out.len() / trials), out);
            Ok(())
        })?;
        let block = |number: usize| {
            let mut sums = vec![0.0; trials];
            for row in number * BLOCK..x.rows().min((number + 1) * BLOCK) {
                for (sum, distance) in sums.iter_mut().zip(&distances[row * trials..]) {
                    *sum += self.rows.pull(row) * f64::from(distance.min(self.far[row]));
                }
            }
            Ok(sums)
        };
        let sums = self.ctx.map(x.rows().div_ceil(BLOCK), block)?;
        let potential = |trial: usize| sums.iter().map(|block| block[trial]).sum::<f64>();
        let best = (0..trials).min_by(|a, b| potential(*a).total_cmp(&potential(*b))).unwrap_or(0);
        self.lower(|row| distances[row * trials + best])?;
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
