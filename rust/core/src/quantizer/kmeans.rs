//! Plain vector quantization: each row becomes its nearest centroid (Lloyd, 1982).
//! Centroids are rounded to their stored type before rows are assigned to them.

use super::{
    check_codebooks, check_loop, encode_nearest, group, note_distinct, shrink_clusters, within, Encoder, Learned,
    Quantizer,
};
use crate::algo::kmeans::KMeans;
use crate::algo::nearest::Columns;
use crate::bits;
use crate::decoder::{Books, CodebookDtype, Decoder};
use crate::error::Result;
use crate::matrix::Sample;
use crate::pool::Context;
use serde::{Deserialize, Serialize};

/// Parameters of plain vector quantization.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VectorQuantizer {
    n_clusters: usize,
    max_iter: usize,
    tol: f64,
    codebook_dtype: CodebookDtype,
}

impl Default for VectorQuantizer {
    fn default() -> Self {
        VectorQuantizer { n_clusters: 256, max_iter: 25, tol: 1e-4, codebook_dtype: CodebookDtype::Float16 }
    }
}

impl VectorQuantizer {
    fn bits(&self) -> u32 {
        usize::BITS - (self.n_clusters - 1).max(1).leading_zeros()
    }

    fn books(&self, dim: usize, entries: usize, centers: Vec<f32>) -> Result<Decoder> {
        let group = group(dim, entries, vec![0]);
        Ok(Decoder::Books(Books::new(dim, self.bits(), self.codebook_dtype, vec![(group, centers)])?))
    }
}

impl Quantizer for VectorQuantizer {
    const NAME: &'static str = "kmeans";
    const ABOUT: &'static str = "each row becomes its nearest centroid";

    fn check(&self) -> Result<()> {
        within("n_clusters", self.n_clusters, 1, 1 << bits::MAX_BITS)?;
        check_loop(self.max_iter, self.tol)
    }

    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder> {
        check_codebooks(dim, self.bits())?;
        let entries = self.n_clusters.min(rows);
        self.books(dim, entries, crate::error::zeros("the codebook", entries.checked_mul(dim))?)
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        check_codebooks(data.dim(), self.bits())?;
        let mut notes = Vec::new();
        let clusters = shrink_clusters(self.n_clusters, data.len(), &mut notes);
        let kmeans = KMeans { max_iter: self.max_iter, tol: self.tol, ..KMeans::new(clusters) };
        ctx.stage("k-means", self.max_iter as u64);
        let mut found = kmeans.learn(Columns::from(data.rows), data.weights, ctx)?;
        note_distinct(found.distinct, clusters, &mut notes);
        found.centers.truncate(found.distinct * data.dim());
        let decoder = self.books(data.dim(), found.distinct, found.centers)?;
        Ok(Learned { decoder, codes: None, n_iter: found.n_iter, notes })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, _: &Context) -> Result<Encoder<'a>> {
        encode_nearest(decoder)
    }
}
