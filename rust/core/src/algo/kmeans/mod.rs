//! k-means as scikit-learn has it: Lloyd's iterations (and mini-batches), for any number of threads the same bits.
//!
//! Differences: sums are in float64 and in a fixed order; the last labels are the exact nearest centres; the tolerance
//! takes weights into account, so that an integer weight is the same as repeating a row.

mod lloyd;
mod mini_batch;
mod pruning;
mod sums;

use super::nearest::{squared_distance, Centroids, Columns};
use super::{progressive, seeding};
use crate::error::{product, reserved, room, Error, Result};
use crate::pool::Context;
use crate::rng::Rng;

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

/// Centres without labels.
#[derive(Clone, Debug)]
pub struct Codebook {
    /// `n_clusters` centres, row-major.
    pub centers: Vec<f32>,
    /// Iterations, as in [`Clusters`].
    pub n_iter: usize,
    /// Clusters that seeding could fill, as in [`Clusters`].
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
    pub(super) fn gather(&self, chosen: &[usize], ctx: &Context) -> Result<OwnedRows> {
        let mut values = reserved("a copy of rows", chosen.len().checked_mul(self.x.width()))?;
        for rows in chosen.chunks(BLOCK) {
            ctx.check()?;
            rows.iter().for_each(|row| values.extend_from_slice(self.x.row(*row)));
        }
        Ok(OwnedRows {
            values,
            weights: self.weights.map(|weights| chosen.iter().map(|row| weights[*row]).collect()),
            width: self.x.width(),
        })
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
    /// Each row's nearest centre, if the run ended with them.
    labels: Option<Vec<u32>>,
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
        let owned = normalized(x, weights, ctx)?;
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
        room("a clustering", &[self.bytes(x)])?;
        match self.init {
            Init::Centers(centers) if centers.len() != self.n_clusters * x.width() => {
                let expected = format!("{} x {}", self.n_clusters, x.width());
                Err(Error::shape("init", format!("{} values", centers.len()), expected))
            }
            _ => Ok(()),
        }
    }

    /// About the bytes that a clustering takes beside its rows.
    fn bytes(&self, x: Columns) -> Option<usize> {
        /// Of each row: labels, distances, bounds, orders. Of each value of a centre: centres, panels, sums in float64.
        const OF_ROW: usize = 64;
        const OF_CENTER: usize = 40;
        let copied = if self.metric == Metric::Cosine { x.rows() } else { self.max_samples.unwrap_or(0).min(x.rows()) };
        let most = progressive::MOST_VALUES / progressive::FIRST;
        let sampled = self.n_clusters.saturating_mul(progressive::ROWS_PER_CENTER).min(x.rows()).min(most);
        let of_rows = product(&[x.rows(), OF_ROW])?;
        let of_copies = product(&[copied.checked_add(sampled)?, x.width(), 4])?;
        of_rows.checked_add(of_copies)?.checked_add(product(&[self.n_clusters, x.width(), OF_CENTER])?)
    }

    /// The centres alone: spares the last pass over the rows.
    pub fn learn(&self, x: Columns, weights: Option<&[f64]>, ctx: &Context) -> Result<Codebook> {
        self.check(x, weights)?;
        let run = match self.metric {
            Metric::Euclidean => self.learn_rows(&Rows { x, weights }, ctx)?,
            Metric::Cosine => self.learn_rows(&normalized(x, weights, ctx)?.rows(), ctx)?,
        };
        Ok(self.filled(run.centers, run.n_iter, x.width()))
    }

    fn fit_rows(&self, all: &Rows, ctx: &Context) -> Result<Clusters> {
        let run = self.learn_rows(all, ctx)?;
        let (labels, inertia) = judged(all, &run.centers, run.labels, ctx)?;
        let Codebook { centers, n_iter, distinct } = self.filled(run.centers, run.n_iter, all.x.width());
        Ok(Clusters { centers, labels, inertia, n_iter, distinct })
    }

    fn learn_rows(&self, all: &Rows, ctx: &Context) -> Result<Run> {
        let rng = Rng::new(ctx.seed);
        match self.max_samples.map(|size| sub_sample(all, size, &mut rng.stream(u64::MAX), ctx)).transpose()?.flatten()
        {
            None => self.best_run(all, &rng, ctx),
            Some(sample) => Ok(Run { labels: None, ..self.best_run(&sample.rows(), &rng, ctx)? }),
        }
    }

    /// Repeats the last centre where there are too few.
    fn filled(&self, mut centers: Vec<f32>, n_iter: usize, width: usize) -> Codebook {
        let distinct = centers.len() / width;
        for _ in distinct..self.n_clusters {
            centers.extend_from_within(centers.len() - width..);
        }
        Codebook { centers, n_iter, distinct }
    }

    fn best_run(&self, rows: &Rows, rng: &Rng, ctx: &Context) -> Result<Run> {
        // Given centres leave nothing to chance, unless batches are drawn.
        let fixed = matches!(self.init, Init::Centers(_)) && self.batch_size.is_none();
        if fixed || self.n_init == 1 {
            return self.run(rows, &mut rng.stream(0), ctx);
        }
        let mut best: Option<(Run, f64)> = None;
        for number in 0..self.n_init {
            let run = self.run(rows, &mut rng.stream(number as u64), ctx)?;
            let (labels, inertia) = judged(rows, &run.centers, run.labels, ctx)?;
            if best.as_ref().is_none_or(|best| inertia < best.1) {
                best = Some((Run { labels: Some(labels), ..run }, inertia));
            }
        }
        Ok(best.expect("n_init is at least 1").0)
    }

    fn run(&self, rows: &Rows, rng: &mut Rng, ctx: &Context) -> Result<Run> {
        let mut centers = match self.init {
            Init::PlusPlus => seeding::plus_plus(rows, self.n_clusters, rng, ctx)?,
            Init::PlusPlusRounds => seeding::in_rounds(rows, self.n_clusters, rng, ctx)?,
            Init::Progressive if progressive::helps(rows, self.n_clusters, ctx)? => {
                let centers = progressive::centers(rows, self.n_clusters, rng, ctx)?;
                seeding::filled_up(rows, self.n_clusters, centers, rng, ctx)?
            }
            Init::Progressive => seeding::in_rounds(rows, self.n_clusters, rng, ctx)?,
            Init::Random => seeding::random(rows, self.n_clusters, rng, ctx)?,
            Init::Centers(centers) => centers.to_vec(),
        };
        if self.metric == Metric::Cosine {
            centers.chunks_exact_mut(rows.x.width()).for_each(normalize);
        }
        let tol = if self.tol > 0.0 { self.tol * variance(rows, ctx)? } else { 0.0 };
        match self.batch_size {
            None => self.lloyd(rows, centers, tol, ctx),
            Some(size) => self.mini_batches(rows, centers, size.min(rows.x.rows()), tol, rng, ctx),
        }
    }
}

/// Exact labels, where they are not known yet, and the inertia.
fn judged(rows: &Rows, centers: &[f32], known: Option<Vec<u32>>, ctx: &Context) -> Result<(Vec<u32>, f64)> {
    let (n, width) = (rows.x.rows(), rows.x.width());
    let centroids = Centroids::new(centers, width);
    let size = chunk_rows(centroids.len(), width);
    let chunk = |number: usize| {
        let range = number * size..n.min((number + 1) * size);
        let labels = match &known {
            Some(known) => known[range.clone()].to_vec(),
            None => {
                let mut labels = vec![0; range.len()];
                centroids.exact_block(rows.x.block(range.clone()), &mut labels, None);
                labels
            }
        };
        let distance = |row: usize, label: u32| squared_distance(rows.x.row(row), center(centers, width, label));
        let inertia: f64 = range.zip(&labels).map(|(row, label)| rows.pull(row) * distance(row, *label)).sum();
        Ok((labels, inertia))
    };
    let parts = ctx.map(n.div_ceil(size), chunk)?;
    let inertia = parts.iter().map(|part| part.1).sum();
    Ok((parts.into_iter().flat_map(|part| part.0).collect(), inertia))
}

/// One of several centres.
fn center(centers: &[f32], width: usize, label: u32) -> &[f32] {
    &centers[label as usize * width..][..width]
}

/// Rows that are compared with all centres between two looks at the context: some hundredths of a second, and whole
/// panels of rows.
fn chunk_rows(clusters: usize, width: usize) -> usize {
    ((1 << 28) / (clusters * width)).clamp(64, 4096) / 64 * 64
}

/// Half the squared distance of unit vectors is one minus their cosine.
fn cosine_inertia(rows: &Rows, weights: Option<&[f64]>, clusters: &Clusters, ctx: &Context) -> Result<f64> {
    let width = rows.x.width();
    sum_rows(rows.x.rows(), ctx, |row| {
        let x = rows.x.row(row);
        let center = center(&clusters.centers, width, clusters.labels[row]);
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
fn sub_sample(rows: &Rows, size: usize, rng: &mut Rng, ctx: &Context) -> Result<Option<OwnedRows>> {
    if rows.x.rows() <= size {
        return Ok(None);
    }
    let heavy: Vec<usize> = (0..rows.x.rows()).filter(|row| rows.pull(*row) > 0.0).collect();
    let chosen: Vec<usize> = rng.sample(heavy.len(), size).into_iter().map(|place| heavy[place]).collect();
    (!chosen.is_empty()).then(|| rows.gather(&chosen, ctx)).transpose()
}

/// Rows on the unit sphere; rows of zeros stay and lose their weight, because they pull nowhere.
pub(super) fn normalized(x: Columns, weights: Option<&[f64]>, ctx: &Context) -> Result<OwnedRows> {
    let all = Rows { x, weights };
    let mut owned = all.gather(&(0..x.rows()).collect::<Vec<_>>(), ctx)?;
    let mut pulls = Vec::with_capacity(x.rows());
    for (row, values) in owned.values.chunks_exact_mut(x.width()).enumerate() {
        if row.is_multiple_of(BLOCK) {
            ctx.check()?;
        }
        normalize(values);
        pulls.push(if values.iter().all(|v| *v == 0.0) { 0.0 } else { all.pull(row) });
    }
    owned.weights = Some(pulls);
    Ok(owned)
}

fn normalize(values: &mut [f32]) {
    let norm = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    if norm > 0.0 {
        values.iter_mut().for_each(|v| *v = (f64::from(*v) / norm) as f32);
    }
}

#[cfg(test)]
mod tests;
