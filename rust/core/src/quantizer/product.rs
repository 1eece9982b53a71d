//! Product quantization (Jégou, Douze and Schmid, 2011): each part of a row becomes the nearest centroid of its own
//! codebook. Unlike the paper, the dimension need not be divisible: the first parts are one column wider.

use super::{
    check_codebooks, check_loop, encode_nearest, group, note_distinct, shrink_clusters, within, Encoder, Learned,
    Quantizer, Turning, BLOCK_ROWS,
};
use crate::algo::kmeans::KMeans;
use crate::algo::linear::{cross_moments, eigen, identity, nearest_orthogonal, second_moments, Projection};
use crate::algo::nearest::{squared_distance, Centroids, Columns, Parts};
use crate::decoder::{Books, CodebookDtype, Decoder, GroupSpec};
use crate::error::{reserved, zeros, Result};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use crate::rng::Rng;
use serde::{Deserialize, Serialize};

/// Parameters of product quantization.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProductQuantizer {
    pub(super) n_subvectors: usize,
    pub(super) n_bits: u32,
    pub(super) max_iter: usize,
    pub(super) tol: f64,
    pub(super) codebook_dtype: CodebookDtype,
}

impl Default for ProductQuantizer {
    fn default() -> Self {
        ProductQuantizer { n_subvectors: 8, n_bits: 8, max_iter: 25, tol: 1e-4, codebook_dtype: CodebookDtype::Float16 }
    }
}

/// Start and width of each of `parts` parts of `dim` columns; widths differ by at most one.
pub(super) fn split(dim: usize, parts: usize) -> Vec<(usize, usize)> {
    let (width, wider) = (dim / parts, dim % parts);
    (0..parts).map(|m| (m * width + m.min(wider), width + usize::from(m < wider))).collect()
}

/// A copy of some columns: clustering reads them many times, and row by row they would be far apart.
pub(super) fn gathered(rows: Matrix, start: usize, width: usize) -> Result<Vec<f32>> {
    let mut part = reserved("a part of the rows", rows.rows().checked_mul(width))?;
    rows.data().chunks_exact(rows.dim()).for_each(|row| part.extend_from_slice(&row[start..start + width]));
    Ok(part)
}

/// Rows that a rotation is learned from: so many for each entry and for each column, but not more than the last.
const ROWS_PER_ENTRY: usize = 64;
const ROWS_PER_COLUMN: usize = 32;
const MOST_ROWS: usize = 65_536;

/// Rounds of codes and rotation: the first ones tell which start is better.
const TRIAL_ROUNDS: usize = 3;
const ROUNDS: usize = 30;

/// Iterations of the first codebooks; each round then improves them a little.
const FIRST_ITERATIONS: usize = 6;

/// A round that takes off less than this share of the error is the last one.
const SETTLED: f64 = 1e-3;

/// A rotation with the codebooks of the rows that it turned.
struct Turned {
    rotation: Vec<f32>,
    books: Vec<Vec<f32>>,
    /// Squared error of the last codes.
    error: f64,
}

/// Components so that parts share the variance (Ge, He, Ke and Sun, 2013): from the largest on, each goes to the part
/// with the smallest product of variances that has room.
fn balanced(variances: &[f64], parts: usize) -> Vec<usize> {
    let mut buckets = vec![(0f64, Vec::new()); parts];
    let widths: Vec<usize> = split(variances.len(), parts).into_iter().map(|(_, width)| width).collect();
    let least = variances[0] * 1e-12 + f64::MIN_POSITIVE;
    for (component, variance) in variances.iter().enumerate() {
        let free = (0..parts).filter(|part| buckets[*part].1.len() < widths[*part]);
        // An empty part before any other: its product is that of nothing.
        let fewest = |part: &usize| (!buckets[*part].1.is_empty(), buckets[*part].0);
        let part = free.min_by(|a, b| fewest(a).0.cmp(&fewest(b).0).then(fewest(a).1.total_cmp(&fewest(b).1)));
        let (product, components) = &mut buckets[part.unwrap_or_default()];
        *product += (variance / least).max(1.0).ln();
        components.push(component);
    }
    buckets.into_iter().flat_map(|(_, components)| components).collect()
}

impl ProductQuantizer {
    /// Clusters the parts side by side, each on one thread, or where they are few one after the other on all.
    fn each_part<T: Send>(
        &self,
        rows: Matrix,
        ctx: &Context,
        cluster: impl Fn(usize, Columns, &Context) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let parts = split(rows.dim(), self.parts(rows.dim()));
        let cluster = |number: usize, ctx: &Context| {
            let (start, width) = parts[number];
            let part = gathered(rows, start, width)?;
            let ctx = ctx.with_seed(ctx.seed.wrapping_add(number as u64));
            cluster(number, Columns::contiguous(&part, width), &ctx)
        };
        match parts.len() >= 2 * ctx.threads() {
            true => ctx.map(parts.len(), |number| cluster(number, &ctx.serial())),
            false => (0..parts.len()).map(|number| cluster(number, ctx)).collect(),
        }
    }

    fn parts(&self, dim: usize) -> usize {
        self.n_subvectors.min(dim)
    }

    /// Codebooks of turned rows, to start from.
    fn first_books(&self, rows: Matrix, weights: Option<&[f64]>, ctx: &Context) -> Result<Vec<Vec<f32>>> {
        let kmeans = KMeans { max_iter: FIRST_ITERATIONS, ..KMeans::new(rows.rows().min(1 << self.n_bits)) };
        let learn = |_: usize, x: Columns, ctx: &Context| Ok(kmeans.learn(x, weights, ctx)?.centers);
        self.each_part(rows, ctx, learn)
    }

    /// Rounds of codes for the rotation and the rotation for the codes (Ge, He, Ke and Sun, 2013). A round is one
    /// assignment: means of its rows, then the rotation that brings rows nearest to these means.
    fn alternate(&self, data: Sample, mut turned: Turned, rounds: usize, ctx: &Context) -> Result<Turned> {
        let dim = data.dim();
        for _ in 0..rounds {
            let rows = Projection::new(&turned.rotation, dim).apply_all(data.rows.into(), ctx)?;
            let rows = Matrix::new(&rows, dim)?;
            if turned.books.is_empty() {
                turned.books = self.first_books(rows, data.weights, ctx)?;
            }
            let (decoded, error) = means(rows, data.weights, &mut turned.books, ctx)?;
            let moments = cross_moments(Columns::contiguous(&decoded, dim), data.rows.into(), data.weights, ctx)?;
            turned.rotation = nearest_orthogonal(&scaled(&moments), dim, ctx)?;
            ctx.advance(1);
            let gain = turned.error - error;
            turned.error = error;
            if gain < SETTLED * error {
                break;
            }
        }
        Ok(turned)
    }

    /// Parts of equal width become one group. `books` holds each part's centers.
    fn books(&self, dim: usize, entries: usize, books: Vec<Vec<f32>>) -> Result<Decoder> {
        let mut groups: Vec<(GroupSpec, Vec<f32>)> = Vec::new();
        for ((start, width), centers) in split(dim, books.len()).into_iter().zip(books) {
            match groups.last_mut().filter(|(last, _)| last.width == width) {
                Some((group, values)) => {
                    group.starts.push(start);
                    values.extend(centers);
                }
                None => groups.push((group(width, entries, vec![start]), centers)),
            }
        }
        Ok(Decoder::Books(Books::new(dim, self.n_bits, self.codebook_dtype, groups)?))
    }
}

impl Quantizer for ProductQuantizer {
    const NAME: &'static str = "product";
    const ABOUT: &'static str = "each part of a row becomes the nearest centroid of its own codebook";

    fn check(&self) -> Result<()> {
        within("n_subvectors", self.n_subvectors, 1, 1 << 20)?;
        within("n_bits", self.n_bits as usize, 1, 16)?;
        check_loop(self.max_iter, self.tol)
    }

    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder> {
        check_codebooks(dim, self.n_bits)?;
        let entries = rows.min(1 << self.n_bits);
        let parts = split(dim, self.n_subvectors.min(dim));
        let zeros = |(_, width): &(usize, usize)| zeros("the codebooks", entries.checked_mul(*width));
        self.books(dim, entries, parts.iter().map(zeros).collect::<Result<_>>()?)
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        check_codebooks(data.dim(), self.n_bits)?;
        let mut notes = Vec::new();
        let parts = self.n_subvectors.min(data.dim());
        if parts < self.n_subvectors {
            let (wanted, dim) = (self.n_subvectors, data.dim());
            notes.push(format!("{dim} features are fewer than {wanted} subvectors: using {parts} subvectors"));
        }
        let clusters = shrink_clusters(1 << self.n_bits, data.len(), &mut notes);
        let kmeans = KMeans { max_iter: self.max_iter, tol: self.tol, ..KMeans::new(clusters) };
        ctx.stage("k-means", (self.max_iter * parts) as u64);
        let learn = |_: usize, x: Columns, ctx: &Context| kmeans.learn(x, data.weights, ctx);
        let found = self.each_part(data.rows, ctx, learn)?;
        let n_iter = found.iter().map(|part| part.n_iter).max().unwrap_or(0);
        let fewest = found.iter().map(|part| part.distinct).min().unwrap_or(clusters);
        let books = found.into_iter().map(|part| part.centers).collect();
        note_distinct(fewest, clusters, &mut notes);
        Ok(Learned { decoder: self.books(data.dim(), clusters, books)?, codes: None, n_iter, notes })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, _: &Context) -> Result<Encoder<'a>> {
        encode_nearest(decoder)
    }

    fn usual_rotation(&self) -> Option<Turning> {
        Some(Turning::Learned)
    }

    fn components(&self, variances: &[f64]) -> Vec<usize> {
        balanced(variances, self.parts(variances.len()))
    }

    /// From the principal components, shared out, and from no rotation: the better one goes on.
    fn learn_rotation(&self, data: Sample, ctx: &Context) -> Result<Vec<f32>> {
        let dim = data.dim();
        let wanted = (ROWS_PER_ENTRY << self.n_bits).max(ROWS_PER_COLUMN * dim).min(MOST_ROWS);
        let chosen = Rng::new(ctx.seed).sample(data.len(), wanted);
        let mut rows = reserved("a sample of the rows", chosen.len().checked_mul(dim))?;
        rows.extend(chosen.iter().flat_map(|row| data.rows.row(*row)));
        let weights: Option<Vec<f64>> = data.weights.map(|all| chosen.iter().map(|row| all[*row]).collect());
        let weights = weights.as_deref().filter(|all| all.iter().any(|weight| *weight > 0.0));
        let sample = Sample { rows: Matrix::new(&rows, dim)?, weights };
        let (variances, vectors) = eigen(&second_moments(sample, ctx)?, dim, ctx)?;
        let order = self.components(&variances);
        let principal = order.iter().flat_map(|at| &vectors[at * dim..(at + 1) * dim]).copied().collect();
        let iterations = FIRST_ITERATIONS * self.parts(dim);
        ctx.stage("rotation", (2 * (TRIAL_ROUNDS + iterations) + ROUNDS) as u64);
        let mut best: Option<Turned> = None;
        for rotation in [principal, identity(dim)] {
            let start = Turned { rotation, books: Vec::new(), error: f64::INFINITY };
            let found = self.alternate(sample, start, TRIAL_ROUNDS, ctx)?;
            if best.as_ref().is_none_or(|best| found.error < best.error) {
                best = Some(found);
            }
        }
        match best {
            Some(best) => Ok(self.alternate(sample, best, ROUNDS, ctx)?.rotation),
            None => Ok(identity(dim)),
        }
    }
}

/// Moves each part's centres to the means of the rows that are nearest to them. Returns the rows as these means, and their
/// squared error.
fn means(rows: Matrix, weights: Option<&[f64]>, books: &mut [Vec<f32>], ctx: &Context) -> Result<(Vec<f32>, f64)> {
    let dim = rows.dim();
    let places = split(dim, books.len());
    let centers = |((start, width), book): (&(usize, usize), &Vec<f32>)| (*start, Centroids::new(book, *width));
    let parts = Parts::new(places.iter().zip(&*books).map(centers).collect(), dim);
    // Labels of a block of rows, part after part.
    let mut labels: Vec<u32> = zeros("the codes", rows.rows().checked_mul(books.len()))?;
    ctx.chunks(&mut labels, BLOCK_ROWS * books.len(), |block, labels| {
        let start = block * BLOCK_ROWS;
        parts.nearest_block(Columns::from(rows.block(start..start + labels.len() / places.len())), labels);
        Ok(())
    })?;
    let label = |row: usize, part: usize| {
        let (block, count) =
            (row / BLOCK_ROWS * BLOCK_ROWS, BLOCK_ROWS.min(rows.rows() - row / BLOCK_ROWS * BLOCK_ROWS));
        labels[block * places.len() + part * count + row - block] as usize
    };
    let mut decoded = zeros("decoded rows", Some(rows.data().len()))?;
    let mut error = 0.0;
    for (part, ((start, width), book)) in places.iter().zip(books).enumerate() {
        ctx.check()?;
        let (mut sums, mut totals) = (vec![0f64; book.len()], vec![0f64; book.len() / width]);
        for row in 0..rows.rows() {
            let (entry, weight) = (label(row, part), weights.map_or(1.0, |w| w[row]));
            totals[entry] += weight;
            let values = &rows.row(row)[*start..start + width];
            let sums = &mut sums[entry * width..(entry + 1) * width];
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * f64::from(*value));
        }
        for ((center, sum), total) in book.chunks_mut(*width).zip(sums.chunks(*width)).zip(totals) {
            if total > 0.0 {
                center.iter_mut().zip(sum).for_each(|(center, sum)| *center = (sum / total) as f32);
            }
        }
        for row in 0..rows.rows() {
            let (entry, weight) = (label(row, part), weights.map_or(1.0, |w| w[row]));
            let (values, center) = (&rows.row(row)[*start..start + width], &book[entry * width..(entry + 1) * width]);
            decoded[row * dim + start..row * dim + start + width].copy_from_slice(center);
            error += weight * squared_distance(values, center);
        }
    }
    Ok((decoded, error))
}

/// In float32, over the largest: only the direction counts.
fn scaled(moments: &[f64]) -> Vec<f32> {
    let largest = moments.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
    moments.iter().map(|value| (value / largest) as f32).collect()
}
