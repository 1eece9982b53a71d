//! Product quantization (Jégou, Douze and Schmid, 2011): each part of a row becomes the nearest centroid of its own
//! codebook. Unlike the paper, the dimension need not be divisible: the first parts are one column wider.

use super::{
    check_codebooks, check_loop, encode_nearest, group, note_distinct, shrink_clusters, within, Encoder, Learned,
    Quantizer,
};
use crate::algo::kmeans::KMeans;
use crate::algo::nearest::Columns;
use crate::decoder::{Books, CodebookDtype, Decoder, GroupSpec};
use crate::error::Result;
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use serde::{Deserialize, Serialize};

/// Parameters of product quantization.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProductQuantizer {
    n_subvectors: usize,
    n_bits: u32,
    max_iter: usize,
    tol: f64,
    codebook_dtype: CodebookDtype,
}

impl Default for ProductQuantizer {
    fn default() -> Self {
        ProductQuantizer { n_subvectors: 8, n_bits: 8, max_iter: 25, tol: 1e-4, codebook_dtype: CodebookDtype::Float16 }
    }
}

/// Start and width of each of `parts` parts of `dim` columns; widths differ by at most one.
fn split(dim: usize, parts: usize) -> Vec<(usize, usize)> {
    let (width, wider) = (dim / parts, dim % parts);
    (0..parts).map(|m| (m * width + m.min(wider), width + usize::from(m < wider))).collect()
}

/// A copy of some columns: clustering reads them many times, and row by row they would be far apart.
fn gathered(rows: Matrix, start: usize, width: usize) -> Vec<f32> {
    let mut part = Vec::with_capacity(rows.rows() * width);
    rows.data().chunks_exact(rows.dim()).for_each(|row| part.extend_from_slice(&row[start..start + width]));
    part
}

impl ProductQuantizer {
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
        self.books(dim, entries, parts.iter().map(|(_, width)| vec![0.0; entries * width]).collect())
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
        // Parts are clustered side by side, each on one thread, or where they are few one after the other on all.
        let alone = parts >= 2 * ctx.threads();
        let cluster = |number: usize, ctx: &Context| {
            let (start, width) = split(data.dim(), parts)[number];
            let part = gathered(data.rows, start, width);
            let ctx = ctx.with_seed(ctx.seed.wrapping_add(number as u64));
            kmeans.learn(Columns::from(Matrix::new(&part, width)?), data.weights, &ctx)
        };
        let found = match alone {
            true => ctx.map(parts, |number| cluster(number, &ctx.serial()))?,
            false => (0..parts).map(|number| cluster(number, ctx)).collect::<Result<_>>()?,
        };
        let n_iter = found.iter().map(|part| part.n_iter).max().unwrap_or(0);
        let fewest = found.iter().map(|part| part.distinct).min().unwrap_or(clusters);
        let books = found.into_iter().map(|part| part.centers).collect();
        note_distinct(fewest, clusters, &mut notes);
        Ok(Learned { decoder: self.books(data.dim(), clusters, books)?, codes: None, n_iter, notes })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, _: &Context) -> Result<Encoder<'a>> {
        encode_nearest(decoder)
    }
}
