//! Product quantization (Jégou, Douze and Schmid, 2011): each part of a row becomes the nearest centroid of its own
//! codebook. Unlike the paper, the dimension need not be divisible: the first parts are one column wider.

use super::{check_loop, encode_nearest, group, note_distinct, shrink_clusters, within, Encoder, Learned, Quantizer};
use crate::algo::kmeans::KMeans;
use crate::algo::nearest::Columns;
use crate::decoder::{Books, CodebookDtype, Decoder, GroupSpec};
use crate::error::Result;
use crate::matrix::Sample;
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
        let entries = rows.min(1 << self.n_bits);
        let parts = split(dim, self.n_subvectors.min(dim));
        self.books(dim, entries, parts.iter().map(|(_, width)| vec![0.0; entries * width]).collect())
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        let mut notes = Vec::new();
        let parts = self.n_subvectors.min(data.dim());
        if parts < self.n_subvectors {
            let (wanted, dim) = (self.n_subvectors, data.dim());
            notes.push(format!("{dim} features are fewer than {wanted} subvectors: using {parts} subvectors"));
        }
        let clusters = shrink_clusters(1 << self.n_bits, data.len(), &mut notes);
        let kmeans = KMeans { max_iter: self.max_iter, tol: self.tol, ..KMeans::new(clusters) };
        ctx.stage("k-means", (self.max_iter * parts) as u64);
        let (mut books, mut n_iter, mut fewest) = (Vec::new(), 0, clusters);
        for (number, (start, width)) in split(data.dim(), parts).into_iter().enumerate() {
            let columns = Columns::new(data.rows, start, width);
            let found = kmeans.fit(columns, data.weights, &ctx.with_seed(ctx.seed.wrapping_add(number as u64)))?;
            n_iter = n_iter.max(found.n_iter);
            fewest = fewest.min(found.distinct);
            books.push(found.centers);
        }
        note_distinct(fewest, clusters, &mut notes);
        Ok(Learned { decoder: self.books(data.dim(), clusters, books)?, codes: None, n_iter, notes })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, _: &Context) -> Result<Encoder<'a>> {
        encode_nearest(decoder)
    }
}
