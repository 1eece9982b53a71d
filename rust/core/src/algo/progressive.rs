//! First centres for rows of many columns, where Lloyd's iterations get stuck early: cluster the leading principal
//! directions first, then more and more of them (the "progressive dimensions" of Faiss's residual quantizer).
//!
//! Unlike there, the last step is a mean of the rows themselves, so that only the leading directions are computed.

use super::kmeans::{Init, KMeans, Rows};
use super::nearest::{Centroids, Columns};
use super::seeding;
use crate::error::{zeros, Result};
use crate::pool::Context;
use crate::rng::Rng;

/// Directions in the first step; each step has [`GROWTH`] times as many.
pub(super) const FIRST: usize = 16;
const GROWTH: usize = 4;

/// The most directions of a step.
const MOST: usize = 256;

/// Lloyd's iterations of a step: enough to move on, the next one starts from labels alone.
const STEP_ITERATIONS: usize = 10;

/// Rows per centre that are looked at, and values of their projections at most.
pub(super) const ROWS_PER_CENTER: usize = 256;
pub(super) const MOST_VALUES: usize = 1 << 26;

/// Columns whose covariance is still worth its memory, 256 MiB.
const MOST_COLUMNS: usize = 8192;

/// Rows that covariances are estimated from.
const COVARIANCE_ROWS: usize = 8192;

/// Rows between two looks at cancellation.
const LOOK: usize = 256;

/// Multiplications by the covariance: directions need not be exact, only lead.
const POWER_STEPS: usize = 6;

/// Whether there are many columns, and more distinct rows than centres: else each row should get a centre of its own.
pub(super) fn helps(rows: &Rows, count: usize, ctx: &Context) -> Result<bool> {
    let wide = (FIRST * 3 / 2 + 1..=MOST_COLUMNS).contains(&rows.x.width());
    Ok(wide && seeding::more_distinct_than(rows, count, ctx)?)
}

/// Centres for all columns of `rows`, or fewer than `count` if the rows have fewer distinct values.
pub(super) fn centers(rows: &Rows, count: usize, rng: &mut Rng, ctx: &Context) -> Result<Vec<f32>> {
    let steps = steps(rows.x.width());
    let most = steps.last().copied().unwrap_or(FIRST);
    let chosen = rng.sample(rows.x.rows(), (count * ROWS_PER_CENTER).min(MOST_VALUES / most));
    let sample = rows.gather(&chosen, ctx)?;
    let rows = sample.rows();
    let directions = leading_directions(rows.x, most, rng, ctx)?;
    let projected = products(rows.x, &directions, ctx)?;
    let mut labels: Vec<u32> = Vec::new();
    let mut distinct = count;
    for width in steps {
        let part = Columns::leading(&projected, most, width);
        let start = (!labels.is_empty()).then(|| means(part, &labels, distinct, ctx)).transpose()?;
        let init = start.as_deref().map_or(Init::PlusPlusRounds, Init::Centers);
        let kmeans = KMeans { init, max_iter: STEP_ITERATIONS, ..KMeans::new(distinct) };
        let found = kmeans.fit(part, rows.weights(), &ctx.with_seed(rng.next_u64()))?;
        (labels, distinct) = (found.labels, found.distinct);
    }
    means(rows.x, &labels, distinct, ctx)
}

/// Numbers of directions of the steps before the last, which has all columns.
fn steps(width: usize) -> Vec<usize> {
    let grow = |last: &usize| Some(last * GROWTH);
    std::iter::successors(Some(FIRST), grow).take_while(|step| *step <= MOST && step * 3 / 2 <= width).collect()
}

/// The mean of the rows of each label; the first row stands in for labels without any.
fn means(x: Columns, labels: &[u32], count: usize, ctx: &Context) -> Result<Vec<f32>> {
    let width = x.width();
    let (mut sums, mut counts) = (vec![0f64; count * width], vec![0usize; count]);
    for (row, label) in labels.iter().enumerate() {
        if row.is_multiple_of(LOOK) {
            ctx.check()?;
        }
        counts[*label as usize] += 1;
        let sum = &mut sums[*label as usize * width..][..width];
        sum.iter_mut().zip(x.row(row)).for_each(|(sum, value)| *sum += f64::from(*value));
    }
    let mut centers = Vec::with_capacity(count * width);
    for (sum, count) in sums.chunks(width).zip(counts) {
        match count {
            0 => centers.extend_from_slice(x.row(0)),
            _ => centers.extend(sum.iter().map(|sum| (sum / count as f64) as f32)),
        }
    }
    Ok(centers)
}

/// Orthonormal directions of large variance, the largest first: `count` rows, by orthogonal iteration.
fn leading_directions(x: Columns, count: usize, rng: &mut Rng, ctx: &Context) -> Result<Vec<f32>> {
    let width = x.width();
    let covariance = covariance(x, rng, ctx)?;
    let mut directions: Vec<f32> = (0..count * width).map(|_| rng.normal() as f32).collect();
    for _ in 0..POWER_STEPS {
        orthonormalize(&mut directions, width, ctx)?;
        // The covariance is symmetric: its rows' products with the directions are its columns'.
        let images = products(Columns::contiguous(&directions, width), &covariance, ctx)?;
        directions = images;
    }
    orthonormalize(&mut directions, width, ctx)?;
    Ok(directions)
}

/// Sums of products of the columns' differences from their means, over a sample.
fn covariance(x: Columns, rng: &mut Rng, ctx: &Context) -> Result<Vec<f32>> {
    let chosen = rng.sample(x.rows(), COVARIANCE_ROWS);
    let mut columns = zeros("a sample of the rows", x.width().checked_mul(chosen.len()))?;
    for (place, row) in chosen.iter().enumerate() {
        if place.is_multiple_of(LOOK) {
            ctx.check()?;
        }
        for (column, value) in x.row(*row).iter().enumerate() {
            columns[column * chosen.len() + place] = *value;
        }
    }
    for (number, column) in columns.chunks_mut(chosen.len()).enumerate() {
        if number.is_multiple_of(LOOK) {
            ctx.check()?;
        }
        let mean = (column.iter().map(|v| f64::from(*v)).sum::<f64>() / column.len() as f64) as f32;
        column.iter_mut().for_each(|v| *v -= mean);
    }
    products(Columns::contiguous(&columns, chosen.len()), &columns, ctx)
}

/// All scalar products of rows with other rows.
fn products(x: Columns, others: &[f32], ctx: &Context) -> Result<Vec<f32>> {
    const BLOCK: usize = 64;
    let packed = Centroids::new(others, x.width());
    let mut out = zeros("products of rows", x.rows().checked_mul(packed.len()))?;
    ctx.chunks(&mut out, BLOCK * packed.len(), |block, out| {
        let first = block * BLOCK;
        packed.dots_block(x.block(first..first + out.len() / packed.len()), out);
        Ok(())
    })?;
    Ok(out)
}

/// Gram and Schmidt, in order; directions that vanish stay zero.
fn orthonormalize(directions: &mut [f32], width: usize, ctx: &Context) -> Result<()> {
    for at in 0..directions.len() / width {
        ctx.check()?;
        let (before, rest) = directions.split_at_mut(at * width);
        let direction = &mut rest[..width];
        let size = norm(direction);
        // Twice is enough to be orthogonal to rounding.
        for _ in 0..2 {
            for other in before.chunks(width) {
                let share = other.iter().zip(&*direction).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                direction.iter_mut().zip(other).for_each(|(d, o)| *d -= share as f32 * o);
            }
        }
        let left = norm(direction);
        let keep = if left > 1e-6 * size { 1.0 / left } else { 0.0 };
        direction.iter_mut().for_each(|d| *d = (f64::from(*d) * keep) as f32);
    }
    Ok(())
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::Matrix;

    #[test]
    fn directions_are_orthonormal_and_lead() {
        let (mut rng, ctx, width) = (Rng::new(1), Context::new(Some(2), 0), 40);
        let scale = |column: usize| 1.0 / (1.0 + column as f64);
        let x: Vec<f32> = (0..2000 * width).map(|i| (5.0 + rng.normal() * scale(i % width)) as f32).collect();
        let x = Columns::from(Matrix::new(&x, width).unwrap());
        let directions = leading_directions(x, 16, &mut rng, &ctx).unwrap();
        for (i, a) in directions.chunks(width).enumerate() {
            for (j, b) in directions.chunks(width).enumerate() {
                let product: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                assert!((product - if i == j { 1.0 } else { 0.0 }).abs() < 1e-5, "{i} {j} {product}");
            }
        }
        // The columns' own variances fall with the column: the first directions are the first columns.
        for (column, direction) in directions.chunks(width).take(3).enumerate() {
            assert!(direction[column].abs() > 0.95, "{column}: {direction:?}");
        }
    }

    #[test]
    fn steps_grow_towards_the_width() {
        assert_eq!(steps(24), [16]);
        assert_eq!(steps(100), [16, 64]);
        assert_eq!(steps(4096), [16, 64, 256]);
    }

    #[test]
    fn beats_seeding_by_distance_on_many_columns() {
        let (mut rng, ctx, width, rank) = (Rng::new(2), Context::new(Some(2), 3), 192, 24);
        // Rows near a subspace, in noise that is as strong as they are: distances say little of where they lie.
        let basis: Vec<f64> = (0..rank * width).map(|_| rng.normal()).collect();
        let mut x = Vec::new();
        for _ in 0..3000 {
            let place: Vec<f64> = (0..rank).map(|i| rng.normal() / (1.0 + i as f64).sqrt()).collect();
            for column in 0..width {
                let value: f64 = place.iter().enumerate().map(|(i, p)| p * basis[i * width + column]).sum();
                x.push((value + 2.0 * rng.normal()) as f32);
            }
        }
        let x = Columns::from(Matrix::new(&x, width).unwrap());
        let inertia = |init| KMeans { init, ..KMeans::new(64) }.fit(x, None, &ctx).unwrap().inertia;
        let (progressive, plus_plus) = (inertia(Init::Progressive), inertia(Init::PlusPlus));
        assert!(progressive < 0.995 * plus_plus, "{progressive} {plus_plus}");
    }
}
