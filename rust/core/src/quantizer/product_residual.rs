//! Product-residual quantization: a row is cut into parts as in product quantization (Jégou, Douze and Schmid, 2011), and
//! each part is a sum of entries as in residual quantization (Chen, Guan and Wang, 2010).
//!
//! One part is residual quantization, one stage is product quantization; between them the codebooks are narrower than
//! those of the one, and the error is smaller than that of the other.

use super::product::{gathered, split, ProductQuantizer};
use super::residual::beam::{Beams, Stages};
use super::residual::{Found, ResidualQuantizer};
use super::{check_codebooks, group, within, Encoder, Learned, Quantizer, Turning};
use crate::bits;
use crate::decoder::{Books, CodebookDtype, Decoder, GroupSpec};
use crate::error::{product, zeros, Error, Result};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use serde::{Deserialize, Serialize};

/// Parameters of product-residual quantization.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProductResidualQuantizer {
    n_subvectors: usize,
    n_stages: usize,
    n_bits: u32,
    beam_width: usize,
    n_refinements: usize,
    max_iter: usize,
    tol: f64,
    codebook_dtype: CodebookDtype,
}

impl Default for ProductResidualQuantizer {
    fn default() -> Self {
        ProductResidualQuantizer {
            n_subvectors: 4,
            n_stages: 2,
            n_bits: 8,
            beam_width: 8,
            n_refinements: 5,
            max_iter: 25,
            tol: 1e-4,
            codebook_dtype: CodebookDtype::Float16,
        }
    }
}

impl ProductResidualQuantizer {
    /// What codes a part.
    fn residual(&self) -> ResidualQuantizer {
        ResidualQuantizer {
            n_stages: self.n_stages,
            n_bits: self.n_bits,
            beam_width: self.beam_width,
            // One stage is k-means, as in product quantization.
            n_refinements: if self.n_stages == 1 { 0 } else { self.n_refinements },
            max_iter: self.max_iter,
            tol: self.tol,
            codebook_dtype: self.codebook_dtype,
        }
    }

    /// What splits the columns.
    fn product(&self) -> ProductQuantizer {
        ProductQuantizer {
            n_subvectors: self.n_subvectors,
            n_bits: self.n_bits,
            max_iter: self.max_iter,
            tol: self.tol,
            codebook_dtype: self.codebook_dtype,
        }
    }

    fn check_size(&self, dim: usize) -> Result<()> {
        check_codebooks(self.n_stages.saturating_mul(dim), self.n_bits)
    }

    /// The books of each part, in order, `entries` each; parts of equal width become one group.
    fn books(&self, dim: usize, entries: usize, parts: Vec<Vec<f32>>) -> Result<Decoder> {
        let mut groups: Vec<(GroupSpec, Vec<f32>)> = Vec::new();
        for ((start, width), values) in split(dim, parts.len()).into_iter().zip(parts) {
            let starts = vec![start; self.n_stages];
            match groups.last_mut().filter(|(last, _)| last.width == width) {
                Some((group, all)) => {
                    group.starts.extend(starts);
                    all.extend(values);
                }
                None => groups.push((group(width, entries, starts), values)),
            }
        }
        Ok(Decoder::Books(Books::new(dim, self.n_bits, self.codebook_dtype, groups)?))
    }

    /// Learns the parts side by side, each on one thread, or where they are few one after the other on all.
    fn parts(&self, data: Sample, parts: usize, ctx: &Context) -> Result<Vec<Found>> {
        let (places, residual) = (split(data.dim(), parts), self.residual());
        let learn = |number: usize, ctx: &Context| {
            let (start, width) = places[number];
            let part = gathered(data.rows, start, width)?;
            let part = Sample { rows: Matrix::new(&part, width)?, weights: data.weights };
            residual.learn(part, &ctx.with_seed(ctx.seed.wrapping_add(number as u64)))
        };
        match parts >= 2 * ctx.threads() {
            true => ctx.map(parts, |number| learn(number, &ctx.serial())),
            false => (0..parts).map(|number| learn(number, ctx)).collect(),
        }
    }
}

impl Quantizer for ProductResidualQuantizer {
    const NAME: &'static str = "product-residual";
    const ABOUT: &'static str = "each part of a row is a sum of entries, one from each stage's codebook";

    fn check(&self) -> Result<()> {
        within("n_subvectors", self.n_subvectors, 1, 1 << 20)?;
        self.residual().check()
    }

    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder> {
        self.check_size(dim)?;
        let entries = rows.min(1 << self.n_bits);
        let parts = split(dim, self.n_subvectors.min(dim));
        let zeros = |(_, width): &(usize, usize)| zeros("the codebooks", product(&[self.n_stages, entries, *width]));
        self.books(dim, entries, parts.iter().map(zeros).collect::<Result<_>>()?)
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        self.check_size(data.dim())?;
        let mut notes = Vec::new();
        let parts = self.n_subvectors.min(data.dim());
        if parts < self.n_subvectors {
            let (wanted, dim) = (self.n_subvectors, data.dim());
            notes.push(format!("{dim} features are fewer than {wanted} subvectors: using {parts} subvectors"));
        }
        let found = self.parts(data, parts, ctx)?;
        // The parts have much the same to say.
        notes.extend(found.iter().map(|part| &part.notes).max_by_key(|notes| notes.len()).cloned().unwrap_or_default());
        let n_iter = found.iter().map(|part| part.n_iter).max().unwrap_or(0);
        let (entries, mut codes, mut books) = (found[0].stages.entries, Vec::new(), Vec::new());
        for part in found {
            codes.push(part.codes);
            books.push(part.stages.centers);
        }
        let decoder = self.books(data.dim(), entries, books)?;
        let bytes = decoder.row_bytes();
        let mut packed = zeros("the codes", data.len().checked_mul(bytes))?;
        for (row, out) in packed.chunks_mut(bytes).enumerate() {
            let fields = codes.iter().flat_map(|part| part.row(row));
            bits::pack(fields.map(|field| u32::from(*field)), self.n_bits, out);
        }
        Ok(Learned { decoder, codes: Some(packed), n_iter, notes })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        let Decoder::Books(books) = decoder else {
            return Err(Error::shape("the decoder", decoder.form(), "the form books"));
        };
        let all = books.books();
        if !all.len().is_multiple_of(self.n_stages) {
            let expected = format!("{} for each part", self.n_stages);
            return Err(Error::shape("the decoder", format!("{} books", all.len()), expected));
        }
        let mut parts = Vec::new();
        for part in all.chunks(self.n_stages) {
            let (start, width, first) = &part[0];
            let mut stages = Stages::new(*width, first.len() / width);
            part.iter().try_for_each(|(_, _, entries)| stages.push(entries.clone(), ctx))?;
            parts.push((*start, stages));
        }
        let ctx = ctx.serial();
        Ok(Box::new(move |rows: Matrix, out: &mut [u8]| {
            let mut found = Vec::with_capacity(parts.len());
            for (start, stages) in &parts {
                let part = gathered(rows, *start, stages.dim)?;
                let mut beams = Beams::new(rows.rows());
                stages.extend_all(Matrix::new(&part, stages.dim)?, &mut beams, self.beam_width, &ctx)?;
                found.push(beams);
            }
            let bytes = out.len() / rows.rows();
            for (row, code) in out.chunks_mut(bytes).enumerate() {
                let fields = found.iter().flat_map(|beams| beams.best(row));
                bits::pack(fields.map(|field| u32::from(*field)), books.bits(), code);
            }
            Ok(())
        }))
    }

    fn usual_rotation(&self) -> Option<Turning> {
        self.product().usual_rotation()
    }

    fn components(&self, variances: &[f64]) -> Vec<usize> {
        self.product().components(variances)
    }

    fn learn_rotation(&self, data: Sample, ctx: &Context) -> Result<Vec<f32>> {
        self.product().learn_rotation(data, ctx)
    }
}
