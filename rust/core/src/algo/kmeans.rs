//! k-means as scikit-learn has it: Lloyd's iterations (and mini-batches), for any number of threads the same bits.
//!
//! Differences: sums are in float64 and in a fixed order; the last labels are the exact nearest centres; the tolerance
//! takes weights into account, so that an integer weight is the same as repeating a row.

use super::nearest::{squared_distance, Centroids, Columns};
use super::{progressive, seeding};
use crate::error::{Error, Result};
use crate::pool::Context;
use crate::rng::Rng;
use std::ops::Range;

/// How the first centres are chosen.
#[derive(Clone, Copy, Debug)]
pub enum Init<'a> {
    /// k-means++: greedy, as scikit-learn has it, where the work allows, else as `PlusPlusRounds`.
    PlusPlus,
    /// k-means++ with several centres a round, on a sub-sample: quantizers cluster hundreds of parts, for which the
    /// greedy form would take longer than all of Lloyd's iterations, and gain nothing measurable.
    PlusPlusRounds,
    /// From clusterings of the leading principal directions, where there are many columns; else as `PlusPlusRounds`.
    Progressive,
    /// Different rows, drawn by weight.
    Random,
    /// `n_clusters` centres, row-major.
    Centers(&'a [f32]),
}

/// What "near" means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Metric {
    /// Squared Euclidean distance.
    Euclidean,
    /// One minus the cosine; rows and centres are normalised, rows of zeros are at distance 1 from everything.
    Cosine,
}

/// Parameters of a clustering.
#[derive(Clone, Debug)]
pub struct KMeans<'a> {
    /// Number of clusters.
    pub n_clusters: usize,
    /// Iterations at most; for mini-batches, passes over the rows.
    pub max_iter: usize,
    /// Stop when the centres' total squared shift is at most this times the mean variance of the columns.
    pub tol: f64,
    /// Runs from different seeds; the one with the lowest inertia is kept.
    pub n_init: usize,
    /// How the first centres are chosen.
    pub init: Init<'a>,
    /// What "near" means.
    pub metric: Metric,
    /// Rows of a mini-batch; all rows in every iteration if `None`.
    pub batch_size: Option<usize>,
    /// Learn from a random sub-sample of at most so many rows.
    pub max_samples: Option<usize>,
}

/// A clustering.
#[derive(Clone, Debug)]
pub struct Clusters {
    /// `n_clusters` centres, row-major.
    pub centers: Vec<f32>,
    /// Each row's nearest centre.
    pub labels: Vec<u32>,
    /// Sum over the rows of weight times distance.
    pub inertia: f64,
    /// Iterations of the run that was kept; for mini-batches, passes over the rows.
    pub n_iter: usize,
    /// Clusters that seeding could fill. Fewer than `n_clusters` if the rows have fewer distinct values: the centres
    /// after these repeat the last one and no label names them.
    pub distinct: usize,
}

/// Rows and what each counts in the fit.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) x: Columns<'a>,
    weights: Option<&'a [f64]>,
}

impl Rows<'_> {
    /// How much a row counts.
    pub(super) fn pull(&self, row: usize) -> f64 {
        self.weights.map_or(1.0, |weights| weights[row])
    }

    /// What each row counts, if not the same.
    pub(super) fn weights(&self) -> Option<&[f64]> {
        self.weights
    }

    /// A copy of some rows.
    pub(super) fn gather(&self, chosen: &[usize]) -> OwnedRows {
        OwnedRows {
            values: chosen.iter().flat_map(|row| self.x.row(*row)).copied().collect(),
            weights: self.weights.map(|weights| chosen.iter().map(|row| weights[*row]).collect()),
            width: self.x.width(),
        }
    }
}

/// A copy of rows.
pub(super) struct OwnedRows {
    values: Vec<f32>,
    weights: Option<Vec<f64>>,
    width: usize,
}

impl OwnedRows {
    pub(super) fn rows(&self) -> Rows<'_> {
        Rows { x: Columns::contiguous(&self.values, self.width), weights: self.weights.as_deref() }
    }
}

/// One run from one seed.
struct Run {
    centers: Vec<f32>,
    labels: Vec<u32>,
    inertia: f64,
    n_iter: usize,
}

/// Rows that are summed together; sums of blocks are added in order.
const BLOCK: usize = 4096;

impl<'a> KMeans<'a> {
    /// `n_clusters` clusters, 25 iterations, tolerance 1e-4, one progressive run, all rows.
    pub fn new(n_clusters: usize) -> Self {
        KMeans {
            n_clusters,
            max_iter: 25,
            tol: 1e-4,
            n_init: 1,
            init: Init::Progressive,
            metric: Metric::Euclidean,
            batch_size: None,
            max_samples: None,
        }
    }

    /// Clusters the rows. `weights`: one a row, finite and not negative.
    pub fn fit(&self, x: Columns, weights: Option<&[f64]>, ctx: &Context) -> Result<Clusters> {
        self.check(x, weights)?;
        if self.metric == Metric::Euclidean {
            return self.fit_rows(&Rows { x, weights }, ctx);
        }
        let owned = normalized(x, weights);
        let mut clusters = self.fit_rows(&owned.rows(), ctx)?;
        clusters.inertia = cosine_inertia(&owned.rows(), weights, &clusters, ctx)?;
        Ok(clusters)
    }

    fn check(&self, x: Columns, weights: Option<&[f64]>) -> Result<()> {
        let positive = |name: &str, value: usize| match value {
            0 => Err(Error::parameter(name, value, "at least 1")),
            _ => Ok(()),
        };
        positive("n_clusters", self.n_clusters)?;
        positive("n_init", self.n_init)?;
        positive("batch_size", self.batch_size.unwrap_or(1))?;
        positive("max_samples", self.max_samples.unwrap_or(1))?;
        if x.rows() == 0 || x.rows() > u32::MAX as usize {
            return Err(Error::shape("X", format!("{} rows", x.rows()), "from 1 to 2^32 - 1 rows"));
        }
        if let Some(found) = weights.map(<[f64]>::len).filter(|found| *found != x.rows()) {
            let expected = format!("one for each of the {} rows", x.rows());
            return Err(Error::shape("sample_weight", format!("{found} values"), expected));
        }
        match self.init {
            Init::Centers(centers) if centers.len() != self.n_clusters * x.width() => {
                let expected = format!("{} x {}", self.n_clusters, x.width());
                Err(Error::shape("init", format!("{} values", centers.len()), expected))
            }
            _ => Ok(()),
        }
    }

    fn fit_rows(&self, all: &Rows, ctx: &Context) -> Result<Clusters> {
        let rng = Rng::new(ctx.seed);
        let sample = self.max_samples.and_then(|size| sub_sample(all, size, &mut rng.stream(u64::MAX)));
        let mut run = match &sample {
            None => self.best_run(all, &rng, ctx)?,
            Some(sample) => self.best_run(&sample.rows(), &rng, ctx)?,
        };
        if sample.is_some() {
            run = assigned(all, run.centers, run.n_iter, ctx)?;
        }
        let width = all.x.width();
        let distinct = run.centers.len() / width;
        let mut centers = run.centers;
        for _ in distinct..self.n_clusters {
            centers.extend_from_within(centers.len() - width..);
        }
        Ok(Clusters { centers, labels: run.labels, inertia: run.inertia, n_iter: run.n_iter, distinct })
    }

    fn best_run(&self, rows: &Rows, rng: &Rng, ctx: &Context) -> Result<Run> {
        let mut best: Option<Run> = None;
        // Given centres leave nothing to chance, unless batches are drawn.
        let fixed = matches!(self.init, Init::Centers(_)) && self.batch_size.is_none();
        for number in 0..if fixed { 1 } else { self.n_init } {
            let run = self.run(rows, &mut rng.stream(number as u64), ctx)?;
            if best.as_ref().is_none_or(|best| run.inertia < best.inertia) {
                best = Some(run);
            }
        }
        Ok(best.expect("n_init is at least 1"))
    }

    fn run(&self, rows: &Rows, rng: &mut Rng, ctx: &Context) -> Result<Run> {
        let mut centers = match self.init {
            Init::PlusPlus => seeding::plus_plus(rows, self.n_clusters, rng, ctx)?,
            Init::PlusPlusRounds => seeding::in_rounds(rows, self.n_clusters, rng, ctx)?,
            Init::Progressive if progressive::helps(rows, self.n_clusters) => {
                let centers = progressive::centers(rows, self.n_clusters, rng, ctx)?;
                seeding::filled_up(rows, self.n_clusters, centers, rng, ctx)?
            }
            Init::Progressive => seeding::in_rounds(rows, self.n_clusters, rng, ctx)?,
            Init::Random => seeding::random(rows, self.n_clusters, rng),
            Init::Centers(centers) => centers.to_vec(),
        };
        if self.metric == Metric::Cosine {
            centers.chunks_exact_mut(rows.x.width()).for_each(normalize);
        }
        let tol = self.tol * variance(rows, ctx)?;
        match self.batch_size {
            None => self.lloyd(rows, centers, tol, ctx),
            Some(size) => self.mini_batches(rows, centers, size.min(rows.x.rows()), tol, rng, ctx),
        }
    }

    fn lloyd(&self, rows: &Rows, mut centers: Vec<f32>, tol: f64, ctx: &Context) -> Result<Run> {
        let width = rows.x.width();
        let mut labels = vec![0; rows.x.rows()];
        let mut before = vec![u32::MAX; rows.x.rows()];
        let (mut n_iter, mut exact) = (0, false);
        while n_iter < self.max_iter {
            n_iter += 1;
            let centroids = Centroids::new(&centers, width);
            if !exact {
                centroids.nearest(rows.x, &mut labels, None, ctx)?;
                exact = labels == before;
            }
            // Near-ties that float32 decides at random must not end the search: from here on labels are exact.
            if exact {
                centroids.nearest_exact(rows.x, &mut labels, None, ctx)?;
                if labels == before {
                    let inertia = inertia(rows, &centers, &labels, ctx)?;
                    return Ok(Run { centers, labels, inertia, n_iter });
                }
            }
            relocate_empty(rows, &centroids, &mut labels, ctx)?;
            let new = self.means(rows, &labels, &centers, ctx)?;
            let shift: f64 = centers.iter().zip(&new).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
            (centers, before) = (new, labels.clone());
            ctx.advance(1);
            if shift <= tol {
                break;
            }
        }
        assigned(rows, centers, n_iter, ctx)
    }

    /// The weighted mean of each cluster's rows; clusters without weight keep their centre.
    fn means(&self, rows: &Rows, labels: &[u32], centers: &[f32], ctx: &Context) -> Result<Vec<f32>> {
        let width = rows.x.width();
        let order = Order::new(labels, centers.len() / width);
        let mut new = centers.to_vec();
        // Groups of clusters bound the memory for sums.
        for (group, new) in new.chunks_mut(GROUP * width).enumerate() {
            let pieces = order.pieces(group * GROUP..group * GROUP + new.len() / width);
            let mut sums = vec![0.0; pieces.len() * (width + 1)];
            ctx.chunks(&mut sums, width + 1, |piece, sum| {
                add_rows(rows, &order.rows[pieces[piece].1.clone()], sum);
                Ok(())
            })?;
            let mut sums =
                pieces.iter().map(|piece| piece.0 - group * GROUP).zip(sums.chunks_exact_mut(width + 1)).peekable();
            while let Some((cluster, total)) = sums.next() {
                while let Some((_, more)) = sums.next_if(|next| next.0 == cluster) {
                    total.iter_mut().zip(more).for_each(|(total, more)| *total += *more);
                }
                self.center_of(total, &mut new[cluster * width..][..width]);
            }
        }
        Ok(new)
    }

    /// Turns `[sum of weight, weighted sum of rows]` into a centre, which stays as it is where there is none.
    fn center_of(&self, total: &[f64], center: &mut [f32]) {
        let divisor = match self.metric {
            Metric::Euclidean => total[0],
            Metric::Cosine => total[1..].iter().map(|v| v * v).sum::<f64>().sqrt(),
        };
        if divisor > 0.0 {
            for (center, sum) in center.iter_mut().zip(&total[1..]) {
                *center = (sum / divisor) as f32;
            }
        }
    }
}

/// Clusters whose sums are in memory at the same time.
const GROUP: usize = 1024;

/// The rows in the order of their labels, and by number within a label.
struct Order {
    rows: Vec<u32>,
    starts: Vec<usize>,
}

impl Order {
    fn new(labels: &[u32], clusters: usize) -> Self {
        let mut starts = vec![0; clusters + 1];
        for label in labels {
            starts[*label as usize + 1] += 1;
        }
        for cluster in 0..clusters {
            starts[cluster + 1] += starts[cluster];
        }
        let (mut next, mut rows) = (starts.clone(), vec![0; labels.len()]);
        for (row, label) in labels.iter().enumerate() {
            rows[next[*label as usize]] = row as u32;
            next[*label as usize] += 1;
        }
        Order { rows, starts }
    }

    /// `(cluster, places in the order)` of at most [`BLOCK`] rows each.
    fn pieces(&self, clusters: Range<usize>) -> Vec<(usize, Range<usize>)> {
        let of_cluster = |cluster: usize| {
            let (first, last) = (self.starts[cluster], self.starts[cluster + 1]);
            (first..last).step_by(BLOCK).map(move |from| (cluster, from..last.min(from + BLOCK)))
        };
        clusters.flat_map(of_cluster).collect()
    }
}

/// Adds rows to `[sum of weight, weighted sum of rows]`.
fn add_rows(rows: &Rows, chosen: &[u32], total: &mut [f64]) {
    let (total_weight, sums) = total.split_at_mut(1);
    for row in chosen {
        let pull = rows.pull(*row as usize);
        total_weight[0] += pull;
        for (sum, value) in sums.iter_mut().zip(rows.x.row(*row as usize)) {
            *sum += pull * f64::from(*value);
        }
    }
}

/// Gives each empty cluster the row that is farthest from its centre, as scikit-learn does, but only rows that leave
/// another row of positive weight behind.
fn relocate_empty(rows: &Rows, centroids: &Centroids, labels: &mut [u32], ctx: &Context) -> Result<()> {
    let mut counts = vec![0usize; centroids.len()];
    for (row, label) in labels.iter().enumerate() {
        counts[*label as usize] += usize::from(rows.pull(row) > 0.0);
    }
    let empty: Vec<usize> = (0..counts.len()).filter(|cluster| counts[*cluster] == 0).collect();
    if empty.is_empty() {
        return Ok(());
    }
    let mut distances = vec![0.0; labels.len()];
    ctx.chunks(&mut distances, BLOCK, |block, out| {
        let range = block * BLOCK..block * BLOCK + out.len();
        centroids.distances_to(rows.x.block(range.clone()), &labels[range], out);
        Ok(())
    })?;
    let mut far: Vec<usize> = (0..labels.len()).filter(|row| distances[*row] > 0.0 && rows.pull(*row) > 0.0).collect();
    far.sort_by(|a, b| distances[*b].total_cmp(&distances[*a]).then(a.cmp(b)));
    let mut empty = empty.into_iter();
    let mut target = empty.next();
    for row in far {
        let Some(cluster) = target else { break };
        if counts[labels[row] as usize] > 1 {
            counts[labels[row] as usize] -= 1;
            labels[row] = cluster as u32;
            target = empty.next();
        }
    }
    Ok(())
}

/// Exact labels and inertia for centres.
fn assigned(rows: &Rows, centers: Vec<f32>, n_iter: usize, ctx: &Context) -> Result<Run> {
    let mut labels = vec![0; rows.x.rows()];
    Centroids::new(&centers, rows.x.width()).nearest_exact(rows.x, &mut labels, None, ctx)?;
    let inertia = inertia(rows, &centers, &labels, ctx)?;
    Ok(Run { centers, labels, inertia, n_iter })
}

fn inertia(rows: &Rows, centers: &[f32], labels: &[u32], ctx: &Context) -> Result<f64> {
    let width = rows.x.width();
    sum_rows(rows.x.rows(), ctx, |row| {
        rows.pull(row) * squared_distance(rows.x.row(row), &centers[labels[row] as usize * width..][..width])
    })
}

/// Half the squared distance of unit vectors is one minus their cosine.
fn cosine_inertia(rows: &Rows, weights: Option<&[f64]>, clusters: &Clusters, ctx: &Context) -> Result<f64> {
    let width = rows.x.width();
    sum_rows(rows.x.rows(), ctx, |row| {
        let x = rows.x.row(row);
        let center = &clusters.centers[clusters.labels[row] as usize * width..][..width];
        let zero = |v: &[f32]| v.iter().all(|v| *v == 0.0);
        let distance = if zero(x) || zero(center) { 1.0 } else { squared_distance(x, center) / 2.0 };
        weights.map_or(1.0, |weights| weights[row]) * distance
    })
}

/// The sum of `term` over rows: blocks in parallel, added in order.
fn sum_rows(rows: usize, ctx: &Context, term: impl Fn(usize) -> f64 + Sync) -> Result<f64> {
    let block = |number: usize| Ok((number * BLOCK..rows.min((number + 1) * BLOCK)).map(&term).sum::<f64>());
    Ok(ctx.map(rows.div_ceil(BLOCK), block)?.iter().sum())
}

/// The mean over the columns of their weighted variances.
fn variance(rows: &Rows, ctx: &Context) -> Result<f64> {
    let (x, width) = (rows.x, rows.x.width());
    let origin = x.row(0);
    // Differences from some row keep the subtraction below from losing digits.
    let block = |number: usize| {
        let (mut weight, mut sums, mut squares) = (0.0, vec![0.0; width], 0.0);
        for row in number * BLOCK..x.rows().min((number + 1) * BLOCK) {
            let pull = rows.pull(row);
            weight += pull;
            for ((sum, value), origin) in sums.iter_mut().zip(x.row(row)).zip(origin) {
                let value = f64::from(*value) - f64::from(*origin);
                *sum += pull * value;
                squares += pull * value * value;
            }
        }
        Ok((weight, sums, squares))
    };
    let (mut weight, mut sums, mut squares) = (0.0, vec![0.0; width], 0.0);
    for part in ctx.map(x.rows().div_ceil(BLOCK), block)? {
        weight += part.0;
        sums.iter_mut().zip(&part.1).for_each(|(sum, part)| *sum += part);
        squares += part.2;
    }
    if weight == 0.0 {
        return Ok(0.0);
    }
    let of_means: f64 = sums.iter().map(|sum: &f64| (sum / weight).powi(2)).sum();
    Ok((squares / weight - of_means).max(0.0) / width as f64)
}

/// At most `size` rows of positive weight; `None` if that is all of them.
fn sub_sample(rows: &Rows, size: usize, rng: &mut Rng) -> Option<OwnedRows> {
    if rows.x.rows() <= size {
        return None;
    }
    let heavy: Vec<usize> = (0..rows.x.rows()).filter(|row| rows.pull(*row) > 0.0).collect();
    let chosen: Vec<usize> = rng.sample(heavy.len(), size).into_iter().map(|place| heavy[place]).collect();
    (!chosen.is_empty()).then(|| rows.gather(&chosen))
}

/// Rows on the unit sphere; rows of zeros stay and lose their weight, because they pull nowhere.
pub(super) fn normalized(x: Columns, weights: Option<&[f64]>) -> OwnedRows {
    let all = Rows { x, weights };
    let mut owned = all.gather(&(0..x.rows()).collect::<Vec<_>>());
    let mut pulls = Vec::with_capacity(x.rows());
    for (row, values) in owned.values.chunks_exact_mut(x.width()).enumerate() {
        normalize(values);
        pulls.push(if values.iter().all(|v| *v == 0.0) { 0.0 } else { all.pull(row) });
    }
    owned.weights = Some(pulls);
    owned
}

fn normalize(values: &mut [f32]) {
    let norm = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    if norm > 0.0 {
        values.iter_mut().for_each(|v| *v = (f64::from(*v) / norm) as f32);
    }
}

/// Batches without a better smoothed inertia before mini-batches stop.
const PATIENCE: usize = 10;

/// Centres with less than this part of the heaviest centre's count are dead.
const DEAD: f64 = 0.01;

/// The state of mini-batch k-means (Sculley, 2010).
struct MiniBatch {
    centers: Vec<f32>,
    /// Weight that each centre has seen.
    counts: Vec<f64>,
    /// Rows since dead centres were last looked for.
    since: usize,
    smoothed: Option<f64>,
    lowest: f64,
    waited: usize,
}

impl KMeans<'_> {
    fn mini_batches(
        &self,
        rows: &Rows,
        centers: Vec<f32>,
        size: usize,
        tol: f64,
        rng: &mut Rng,
        ctx: &Context,
    ) -> Result<Run> {
        let (n, width) = (rows.x.rows(), rows.x.width());
        let counts = vec![0.0; centers.len() / width];
        let mut state = MiniBatch { centers, counts, since: 0, smoothed: None, lowest: f64::INFINITY, waited: 0 };
        let steps = (self.max_iter as u128 * n as u128).div_ceil(size as u128) as usize;
        let per_pass = n.div_ceil(size);
        let mut done = 0;
        while done < steps {
            ctx.check()?;
            let chosen: Vec<usize> = (0..size).map(|_| rng.below(n)).collect();
            let batch = rows.gather(&chosen);
            let (inertia, shift) = self.step(&mut state, &batch.rows(), rng, ctx)?;
            done += 1;
            if done % per_pass == 0 {
                ctx.advance(1);
            }
            // The first batch starts from seeds and says little.
            if done > 1 && state.settled(inertia, shift, tol, 2.0 * size as f64 / (n as f64 + 1.0)) {
                break;
            }
        }
        assigned(rows, state.centers, done.div_ceil(per_pass), ctx)
    }

    /// One batch: its mean inertia before, and the squared shift of the centres.
    fn step(&self, state: &mut MiniBatch, batch: &Rows, rng: &mut Rng, ctx: &Context) -> Result<(f64, f64)> {
        let (n, width) = (batch.x.rows(), batch.x.width());
        let (mut labels, mut distances) = (vec![0; n], vec![0.0; n]);
        Centroids::new(&state.centers, width).nearest(batch.x, &mut labels, Some(&mut distances), ctx)?;
        let before = state.centers.clone();
        let order = Order::new(&labels, state.counts.len());
        ctx.chunks(&mut state.centers, width, |cluster, center| {
            let chosen = &order.rows[order.starts[cluster]..order.starts[cluster + 1]];
            let count = state.counts[cluster];
            let mut total = vec![count; width + 1];
            total[1..].iter_mut().zip(&*center).for_each(|(total, center)| *total = count * f64::from(*center));
            add_rows(batch, chosen, &mut total);
            if total[0] > count {
                self.center_of(&total, center);
            }
            Ok(())
        })?;
        for (row, label) in labels.iter().enumerate() {
            state.counts[*label as usize] += batch.pull(row);
        }
        let shift = state.centers.iter().zip(&before).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        state.revive(batch, rng);
        let weight: f64 = (0..n).map(|row| batch.pull(row)).sum();
        let inertia: f64 = (0..n).map(|row| batch.pull(row) * f64::from(distances[row])).sum();
        Ok((if weight > 0.0 { inertia / weight } else { 0.0 }, shift))
    }
}

impl MiniBatch {
    /// Now and then moves dead centres to rows of the batch, half the batch at most.
    fn revive(&mut self, batch: &Rows, rng: &mut Rng) {
        let (n, width) = (batch.x.rows(), batch.x.width());
        self.since += n;
        if self.since < 10 * self.counts.len() {
            return;
        }
        self.since = 0;
        let limit = DEAD * self.counts.iter().fold(0.0, |a: f64, b| a.max(*b));
        let mut dead: Vec<usize> = (0..self.counts.len()).filter(|cluster| self.counts[*cluster] < limit).collect();
        dead.sort_by(|a, b| self.counts[*a].total_cmp(&self.counts[*b]).then(a.cmp(b)));
        dead.truncate(n / 2);
        let alive = self.counts.iter().filter(|count| **count >= limit).fold(f64::INFINITY, |a, b| a.min(*b));
        let heavy: Vec<usize> = (0..n).filter(|row| batch.pull(*row) > 0.0).collect();
        for (cluster, place) in dead.iter().zip(rng.sample(heavy.len(), dead.len())) {
            self.centers[cluster * width..][..width].copy_from_slice(batch.x.row(heavy[place]));
            self.counts[*cluster] = alive;
        }
    }

    /// True once the centres stand still or the smoothed inertia has stopped falling.
    fn settled(&mut self, inertia: f64, shift: f64, tol: f64, alpha: f64) -> bool {
        let alpha = alpha.min(1.0);
        let smoothed = self.smoothed.map_or(inertia, |old| old * (1.0 - alpha) + inertia * alpha);
        self.smoothed = Some(smoothed);
        if smoothed < self.lowest {
            (self.lowest, self.waited) = (smoothed, 0);
        } else {
            self.waited += 1;
        }
        shift <= tol || self.waited >= PATIENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ctx(threads: i64) -> Context {
        Context::new(Some(threads), 7)
    }

    fn normal(seed: u64, count: usize) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..count).map(|_| rng.normal() as f32).collect()
    }

    /// Rows around `clusters` centres on a coarse grid.
    fn clustered(seed: u64, rows: usize, width: usize, clusters: usize) -> Vec<f32> {
        let centers = normal(seed, clusters * width);
        let mut rng = Rng::new(seed + 1);
        let mut x = Vec::new();
        for _ in 0..rows {
            let center = &centers[rng.below(clusters) * width..][..width];
            x.extend(center.iter().map(|c| 10.0 * c + rng.normal() as f32));
        }
        x
    }

    fn brute(x: Columns, centers: &[f32], used: usize) -> Vec<u32> {
        let distance = |row: usize, j: usize| squared_distance(x.row(row), &centers[j * x.width()..][..x.width()]);
        let of_row = |row: usize| {
            let better = |a: usize, b: usize| if distance(row, b) < distance(row, a) { b } else { a };
            (0..used).reduce(better).unwrap() as u32
        };
        (0..x.rows()).map(of_row).collect()
    }

    fn bits(clusters: &Clusters) -> (Vec<u32>, Vec<u32>, u64, usize, usize) {
        let centers = clusters.centers.iter().map(|v| v.to_bits()).collect();
        (centers, clusters.labels.clone(), clusters.inertia.to_bits(), clusters.n_iter, clusters.distinct)
    }

    /// Every way to fit: metric, seeding, batches, sub-samples.
    fn variants(k: usize) -> Vec<KMeans<'static>> {
        let plain = KMeans::new(k);
        vec![
            plain.clone(),
            KMeans { init: Init::Random, n_init: 3, ..plain.clone() },
            KMeans { metric: Metric::Cosine, ..plain.clone() },
            KMeans { max_samples: Some(60), ..plain.clone() },
            KMeans { batch_size: Some(50), max_iter: 5, ..plain.clone() },
            KMeans { batch_size: Some(50), metric: Metric::Cosine, max_samples: Some(100), ..plain },
        ]
    }

    #[test]
    fn inertia_never_increases() {
        for (seed, weighted) in [(1, false), (2, true), (3, false)] {
            let (rows, width, k) = (700, 5, 40);
            let x = clustered(seed, rows, width, 9);
            let weights: Vec<f64> = (0..rows).map(|row| (row % 4) as f64).collect();
            let start = x[..k * width].to_vec();
            let mut last = f64::INFINITY;
            for max_iter in 0..12 {
                let kmeans = KMeans { max_iter, tol: 0.0, init: Init::Centers(&start), ..KMeans::new(k) };
                let weights = weighted.then_some(weights.as_slice());
                let fit = kmeans.fit(Columns::contiguous(&x, width), weights, &ctx(2)).unwrap();
                assert!(fit.inertia <= last * (1.0 + 1e-9), "{} after {last}", fit.inertia);
                last = fit.inertia;
            }
        }
    }

    #[test]
    fn centres_are_means_and_labels_are_nearest() {
        let (rows, width, k) = (900, 6, 12);
        let x = clustered(4, rows, width + 2, 20);
        let matrix = crate::matrix::Matrix::new(&x, width + 2).unwrap();
        let x = Columns::new(matrix, 2, width);
        let weights: Vec<f64> = (0..rows).map(|row| (row % 3) as f64 * 0.7).collect();
        let kmeans = KMeans { max_iter: 300, tol: 0.0, ..KMeans::new(k) };
        let fit = kmeans.fit(x, Some(&weights), &ctx(2)).unwrap();
        assert!(fit.n_iter < 300 && fit.distinct == k);
        assert_eq!(fit.labels, brute(x, &fit.centers, k));
        for cluster in 0..k {
            let members = || (0..rows).filter(|row| fit.labels[*row] == cluster as u32);
            let weight: f64 = members().map(|row| weights[row]).sum();
            for t in 0..width {
                let sum: f64 = members().map(|row| weights[row] * f64::from(x.row(row)[t])).sum();
                let center = f64::from(fit.centers[cluster * width + t]);
                assert!((sum / weight - center).abs() <= 1e-6 * (1.0 + center.abs()));
            }
        }
        let center = |row: usize| &fit.centers[fit.labels[row] as usize * width..][..width];
        let expected: f64 = (0..rows).map(|row| weights[row] * squared_distance(x.row(row), center(row))).sum();
        assert!((fit.inertia - expected).abs() < 1e-9 * expected);
    }

    #[test]
    fn labels_are_nearest_with_ties_too() {
        // Integers on a line: many rows are just as far from two centres.
        let x: Vec<f32> = (0..200).map(|i| (i * 7 % 20) as f32).collect();
        let x = Columns::contiguous(&x, 1);
        for k in [2, 3, 5, 7] {
            for kmeans in variants(k) {
                if kmeans.metric == Metric::Euclidean {
                    let fit = kmeans.fit(x, None, &ctx(1)).unwrap();
                    assert_eq!(fit.labels, brute(x, &fit.centers, fit.distinct));
                }
            }
        }
    }

    #[test]
    fn as_many_clusters_as_rows_leave_no_error() {
        // 12 different rows, each several times, with 0 and -0 among the values.
        let values: Vec<f32> =
            (0..24).map(|i| [(i / 2) as f32 - 5.0, if i % 4 < 2 { 0.0 } else { -0.0 }][i % 2]).collect();
        let x: Vec<f32> = (0..60).flat_map(|row| values[row % 12 * 2..][..2].to_vec()).collect();
        let x = Columns::contiguous(&x, 2);
        for init in [Init::PlusPlus, Init::Random] {
            for k in [12, 13, 40, 100] {
                let fit = KMeans { init, ..KMeans::new(k) }.fit(x, None, &ctx(2)).unwrap();
                assert_eq!((fit.inertia, fit.distinct), (0.0, 12));
                assert_eq!(fit.centers.len(), k * 2);
                assert!(fit.labels.iter().all(|label| *label < 12));
                assert!(fit.centers[12 * 2..].chunks(2).all(|center| center == &fit.centers[11 * 2..12 * 2]));
                for row in 0..60 {
                    assert_eq!(x.row(row), &fit.centers[fit.labels[row] as usize * 2..][..2]);
                }
            }
        }
    }

    #[test]
    fn integer_weights_repeat_rows() {
        let (rows, width, k) = (300, 4, 10);
        // Multiples of 1/8: sums are exact in any order.
        let x: Vec<f32> = clustered(5, rows, width, 10).iter().map(|v| (v * 8.0).round() / 8.0).collect();
        let weights: Vec<f64> = (0..rows).map(|row| (row % 4) as f64).collect();
        let start: Vec<f32> = x[..k * width].to_vec();
        let repeated: Vec<f32> =
            (0..rows).flat_map(|row| x[row * width..][..width].repeat(weights[row] as usize)).collect();
        let kmeans = KMeans { init: Init::Centers(&start), ..KMeans::new(k) };
        let weighted = kmeans.fit(Columns::contiguous(&x, width), Some(&weights), &ctx(1)).unwrap();
        let plain = kmeans.fit(Columns::contiguous(&repeated, width), None, &ctx(1)).unwrap();
        assert_eq!(weighted.centers, plain.centers);
        assert_eq!(weighted.n_iter, plain.n_iter);
        assert!((weighted.inertia - plain.inertia).abs() < 1e-9 * plain.inertia);
    }

    #[test]
    fn scale_and_shift() {
        let (rows, width, k) = (400, 3, 8);
        let x: Vec<f32> = clustered(6, rows, width, 8).iter().map(|v| (v * 16.0).round() / 16.0).collect();
        let scaled: Vec<f32> = x.iter().map(|v| v * 1024.0).collect();
        let moved: Vec<f32> = x.iter().map(|v| v + 512.0).collect();
        for kmeans in variants(k) {
            let plain = kmeans.fit(Columns::contiguous(&x, width), None, &ctx(1)).unwrap();
            let big = kmeans.fit(Columns::contiguous(&scaled, width), None, &ctx(1)).unwrap();
            assert_eq!(big.labels, plain.labels);
            if kmeans.metric == Metric::Euclidean {
                assert!(plain.centers.iter().zip(&big.centers).all(|(a, b)| a * 1024.0 == *b));
                let far = kmeans.fit(Columns::contiguous(&moved, width), None, &ctx(1)).unwrap();
                assert!((far.inertia - plain.inertia).abs() < 1e-3 * plain.inertia);
            } else {
                assert_eq!(plain.centers, big.centers);
            }
        }
    }

    #[test]
    fn threads_change_nothing() {
        let (rows, width) = (9000, 4);
        let x = clustered(8, rows, width, 30);
        let x = Columns::contiguous(&x, width);
        let weights: Vec<f64> = (0..rows).map(|row| 0.1 + (row % 7) as f64).collect();
        for kmeans in variants(50) {
            for weights in [None, Some(weights.as_slice())] {
                let fits: Vec<_> = (1..=3).map(|n| bits(&kmeans.fit(x, weights, &ctx(n)).unwrap())).collect();
                assert!(fits[0] == fits[1] && fits[0] == fits[2]);
            }
        }
    }

    #[test]
    fn permuted_rows_permute_labels() {
        let (rows, width, k) = (300, 3, 9);
        let x: Vec<f32> = clustered(9, rows, width, 9).iter().map(|v| (v * 8.0).round() / 8.0).collect();
        let start = x[..k * width].to_vec();
        let order: Vec<usize> = (0..rows).map(|row| row * 7 % rows).collect();
        let permuted: Vec<f32> = order.iter().flat_map(|row| x[row * width..][..width].to_vec()).collect();
        let kmeans = KMeans { init: Init::Centers(&start), ..KMeans::new(k) };
        let a = kmeans.fit(Columns::contiguous(&x, width), None, &ctx(1)).unwrap();
        let b = kmeans.fit(Columns::contiguous(&permuted, width), None, &ctx(1)).unwrap();
        assert_eq!(a.centers, b.centers);
        assert!(order.iter().enumerate().all(|(new, old)| a.labels[*old] == b.labels[new]));
    }

    #[test]
    fn empty_clusters_are_filled() {
        let (rows, width, k) = (500, 2, 20);
        let x = clustered(10, rows, width, 20);
        // All but one of the first centres are equal and too far away to win a row.
        let mut start = vec![1e4; k * width];
        start[..width].copy_from_slice(&x[..width]);
        let kmeans = KMeans { init: Init::Centers(&start), max_iter: 100, ..KMeans::new(k) };
        let fit = kmeans.fit(Columns::contiguous(&x, width), None, &ctx(2)).unwrap();
        let mut seen = vec![false; k];
        fit.labels.iter().for_each(|label| seen[*label as usize] = true);
        assert!(seen.iter().all(|seen| *seen));
        let one = KMeans::new(1).fit(Columns::contiguous(&x, width), None, &ctx(2)).unwrap();
        assert!(fit.inertia < one.inertia / 2.0);
    }

    #[test]
    fn edges() {
        let constant = [3.0f32; 40];
        let zeros = [0.0f32; 40];
        for data in [&constant, &zeros] {
            for width in [1, 4] {
                for kmeans in variants(3) {
                    let fit = kmeans.fit(Columns::contiguous(data, width), None, &ctx(2)).unwrap();
                    assert_eq!((fit.distinct, fit.centers.len()), (1, 3 * width));
                    assert!(fit.labels.iter().all(|label| *label == 0));
                    let none = data[0] == 0.0 && kmeans.metric == Metric::Cosine;
                    assert!((fit.inertia - if none { (40 / width) as f64 } else { 0.0 }).abs() < 1e-6);
                }
            }
        }
        // One row, and one row with weight.
        let fit = KMeans::new(1).fit(Columns::contiguous(&[1.0, 2.0], 2), None, &ctx(1)).unwrap();
        assert_eq!((fit.centers, fit.labels, fit.inertia), (vec![1.0, 2.0], vec![0], 0.0));
        for kmeans in variants(2) {
            let fit = kmeans.fit(Columns::contiguous(&[1.0, 2.0, 4.0], 1), Some(&[0.0, 1.0, 0.0]), &ctx(1)).unwrap();
            assert_eq!((fit.distinct, fit.labels), (1, vec![0; 3]));
        }
    }

    #[test]
    fn cosine_ignores_length() {
        let x: Vec<f32> = (0..40).flat_map(|i| [[(i + 1) as f32, 0.0], [0.0, -2.0 * (i + 1) as f32]][i % 2]).collect();
        let kmeans = KMeans { metric: Metric::Cosine, ..KMeans::new(2) };
        let fit = kmeans.fit(Columns::contiguous(&x, 2), None, &ctx(1)).unwrap();
        assert!(fit.inertia.abs() < 1e-9);
        assert!((0..40).all(|row| fit.labels[row] == fit.labels[row % 2]) && fit.labels[0] != fit.labels[1]);
    }

    #[test]
    fn large_problems_are_seeded_from_a_sub_sample() {
        // Few distinct rows in the sub-sample of 64 * 2 rows, more in all of them.
        let (rows, width) = (20_000, 1);
        let x: Vec<f32> = (0..rows).map(|row| if row == 777 { 5.0 } else { 1.0 }).collect();
        let columns = Columns::contiguous(&x, width);
        let all = Rows { x: columns, weights: None };
        // Through the function for large problems, whatever the size of this one.
        let centers = seeding::in_rounds(&all, 2, &mut Rng::new(1), &ctx(1)).unwrap();
        assert_eq!(centers.len(), 2);
        let x = clustered(11, 5000, 3, 300);
        let rows = Rows { x: Columns::contiguous(&x, 3), weights: None };
        let centers = seeding::in_rounds(&rows, 300, &mut Rng::new(2), &ctx(2)).unwrap();
        let run = assigned(&rows, centers, 0, &ctx(2)).unwrap();
        let greedy = assigned(&rows, seeding::plus_plus(&rows, 300, &mut Rng::new(2), &ctx(2)).unwrap(), 0, &ctx(2));
        assert!(run.inertia < 2.5 * greedy.unwrap().inertia);
    }

    #[test]
    fn mini_batches_come_near() {
        let (rows, width, k) = (4000, 4, 16);
        let x = clustered(12, rows, width, 16);
        let x = Columns::contiguous(&x, width);
        let full = KMeans::new(k).fit(x, None, &ctx(2)).unwrap();
        let mini = KMeans { batch_size: Some(256), ..KMeans::new(k) }.fit(x, None, &ctx(2)).unwrap();
        assert!(mini.inertia < 1.3 * full.inertia, "{} {}", mini.inertia, full.inertia);
        assert_eq!(mini.labels, brute(x, &mini.centers, k));
    }

    #[test]
    fn bad_parameters_are_refused() {
        let x = Columns::contiguous(&[1.0, 2.0], 1);
        let refused =
            |kmeans: KMeans, weights: Option<&[f64]>| kmeans.fit(x, weights, &ctx(1)).unwrap_err().to_string();
        assert!(refused(KMeans::new(0), None).contains("n_clusters=0"));
        assert!(refused(KMeans { n_init: 0, ..KMeans::new(1) }, None).contains("n_init=0"));
        assert!(refused(KMeans::new(1), Some(&[1.0])).contains("sample_weight has 1 values"));
        assert!(refused(KMeans { init: Init::Centers(&[1.0]), ..KMeans::new(2) }, None).contains("init has 1 values"));
        assert!(KMeans::new(1).fit(Columns::contiguous(&[], 1), None, &ctx(1)).is_err());
        let stopped = ctx(1);
        stopped.cancel();
        assert!(matches!(KMeans::new(1).fit(x, None, &stopped), Err(Error::Interrupted)));
    }
}
