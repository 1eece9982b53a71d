//! Residual quantization (Chen, Guan and Wang, 2010): a row is a sum of entries, one of each stage's codebook.
//!
//! Encoding is a beam search over inner products and codeword-codeword tables (Babenko and Lempitsky, 2014), so that no
//! residual is computed for a beam entry. After the stages are trained one by one, all codebooks are refined together:
//! least squares for the codes, then codes for the codebooks, keeping each row's old code where that is better.

pub(super) mod beam;
mod solve;

use super::{check_codebooks, check_loop, group, note_distinct, shrink_clusters, within};
use super::{Encoder, Learned, Quantizer, BLOCK_ROWS};
use crate::algo::kmeans::KMeans;
use crate::algo::nearest::Columns;
use crate::bits;
use crate::decoder::{Books, CodebookDtype, Decoder};
use crate::error::{copied, product, room, zeros, Error, Result};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use beam::{Beams, Codes, Stages};
use serde::{Deserialize, Serialize};

/// Parameters of residual quantization.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResidualQuantizer {
    pub(super) n_stages: usize,
    pub(super) n_bits: u32,
    pub(super) beam_width: usize,
    pub(super) n_refinements: usize,
    pub(super) max_iter: usize,
    pub(super) tol: f64,
    pub(super) codebook_dtype: CodebookDtype,
}

impl Default for ResidualQuantizer {
    fn default() -> Self {
        ResidualQuantizer {
            n_stages: 8,
            n_bits: 8,
            beam_width: 8,
            n_refinements: 5,
            max_iter: 25,
            tol: 1e-4,
            codebook_dtype: CodebookDtype::Float16,
        }
    }
}

/// All rows' partial codes above this many bytes are not kept from stage to stage of a fit: they are found again.
const MAX_BEAMS: usize = 1 << 30;

impl ResidualQuantizer {
    fn books(&self, dim: usize, entries: usize, stages: Vec<f32>) -> Result<Decoder> {
        let group = group(dim, entries, vec![0; self.n_stages]);
        Ok(Decoder::Books(Books::new(dim, self.n_bits, self.codebook_dtype, vec![(group, stages)])?))
    }

    /// Trains the stages one after the other, each on what the best partial codes leave over.
    fn stages(&self, data: Sample, entries: usize, ctx: &Context) -> Result<(Stages, Codes, usize, usize)> {
        let dim = data.dim();
        let kmeans = KMeans { max_iter: self.max_iter, tol: self.tol, ..KMeans::new(entries) };
        let mut stages = Stages::new(dim, entries);
        let blocks = data.rows.data().chunks(BLOCK_ROWS * dim);
        let kept = product(&[data.len(), self.beam_width, 2 * self.n_stages + 4]).is_some_and(|all| all <= MAX_BEAMS);
        // What is kept of partial codes, and a copy of the rows.
        let fields = if kept { self.beam_width.saturating_mul(2 * self.n_stages + 4) } else { 4 + 2 * self.n_stages };
        room("a fit of stages", &[product(&[data.len(), fields]), product(&[data.len(), dim, 4])])?;
        let mut beams: Vec<Beams> = blocks.map(|block| Beams::new(block.len() / dim)).collect();
        let (mut n_iter, mut fewest) = (0, entries);
        ctx.stage("k-means", (self.n_stages * self.max_iter) as u64);
        let mut residual = copied("what is left of the rows", data.rows.data())?;
        for number in 0..self.n_stages {
            let seeded = ctx.with_seed(ctx.seed.wrapping_add(number as u64));
            let found = kmeans.learn(Columns::from(Matrix::new(&residual, dim)?), data.weights, &seeded)?;
            n_iter = n_iter.max(found.n_iter);
            if number == 0 {
                fewest = found.distinct;
            }
            stages.push(found.centers, ctx)?;
            ctx.chunks(&mut beams, 1, |block, beams| {
                let rows = data.rows.block(block * BLOCK_ROWS..data.len().min((block + 1) * BLOCK_ROWS));
                if !kept {
                    beams[0] = Beams::new(rows.rows());
                }
                stages.extend_all(rows, &mut beams[0], self.beam_width, ctx)?;
                if !kept || number + 1 == self.n_stages {
                    beams[0].keep_best();
                }
                Ok(())
            })?;
            if number + 1 < self.n_stages {
                stages.residuals(data.rows, &beams, &mut residual, ctx)?;
            }
        }
        Ok((stages, Codes::of(&beams), n_iter, fewest))
    }

    /// All of a fit but the rounding to the stored type.
    pub(super) fn learn(&self, data: Sample, ctx: &Context) -> Result<Found> {
        let mut found = self.start(data, ctx)?;
        self.refine(data, &mut found, ctx)?;
        Ok(found)
    }

    /// The stages one by one.
    pub(super) fn start(&self, data: Sample, ctx: &Context) -> Result<Found> {
        check_codebooks(self.n_stages.saturating_mul(data.dim()), self.n_bits)?;
        let mut notes = Vec::new();
        let entries = shrink_clusters(1 << self.n_bits, data.len(), &mut notes);
        let (stages, codes, n_iter, distinct) = self.stages(data, entries, ctx)?;
        note_distinct(distinct, entries, &mut notes);
        Ok(Found { stages, codes, n_iter, notes })
    }

    /// All codebooks together: least squares for the codes, then codes for the codebooks.
    pub(super) fn refine(&self, data: Sample, found: &mut Found, ctx: &Context) -> Result<()> {
        ctx.stage("refine", self.n_refinements as u64);
        for _ in 0..self.n_refinements {
            found.stages.refine(data, &found.codes, ctx)?;
            let fresh = found.stages.encode(data.rows, self.beam_width, ctx)?;
            found.stages.keep_better(data.rows, &mut found.codes, fresh, ctx)?;
            ctx.advance(1);
        }
        Ok(())
    }

    /// A decoder of the codebooks, and the codes as bytes.
    pub(super) fn finish(&self, found: Found) -> Result<Learned> {
        let Found { stages, codes, n_iter, notes } = found;
        let decoder = self.books(stages.dim, stages.entries, stages.centers)?;
        let mut packed = zeros("the codes", codes.len().checked_mul(decoder.row_bytes()))?;
        for (row, code) in packed.chunks_mut(decoder.row_bytes()).enumerate() {
            pack(codes.row(row), self.n_bits, code);
        }
        Ok(Learned { decoder, codes: Some(packed), n_iter, notes })
    }
}

/// What a fit learned, before it is rounded to the stored type.
pub(super) struct Found {
    pub(super) stages: Stages,
    pub(super) codes: Codes,
    pub(super) n_iter: usize,
    pub(super) notes: Vec<String>,
}

impl Found {
    /// Puts other codebooks and codes in the place of these, which it returns.
    pub(super) fn exchange(&mut self, other: (Vec<f32>, Codes), ctx: &Context) -> Result<(Vec<f32>, Codes)> {
        let centers = self.stages.centers.clone();
        self.stages.replace(other.0, ctx)?;
        Ok((centers, std::mem::replace(&mut self.codes, other.1)))
    }
}

/// The codebooks of a decoder, and the bits of a field.
pub(super) fn stages_of(decoder: &Decoder, ctx: &Context) -> Result<(Stages, u32)> {
    let Decoder::Books(books) = decoder else {
        return Err(Error::shape("the decoder", decoder.form(), "the form books"));
    };
    let books_of = books.books();
    let mut stages = Stages::new(books.dim(), books_of.first().map_or(0, |(_, width, entries)| entries.len() / width));
    books_of.into_iter().try_for_each(|(_, _, entries)| stages.push(entries, ctx))?;
    Ok((stages, books.bits()))
}

impl Quantizer for ResidualQuantizer {
    const NAME: &'static str = "residual";
    const ABOUT: &'static str = "a row is a sum of entries, one from each stage's codebook";

    fn check(&self) -> Result<()> {
        within("n_stages", self.n_stages, 1, 1 << 12)?;
        within("n_bits", self.n_bits as usize, 1, 16)?;
        within("beam_width", self.beam_width, 1, 1 << 12)?;
        within("n_refinements", self.n_refinements, 0, 1000)?;
        check_loop(self.max_iter, self.tol)
    }

    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder> {
        check_codebooks(self.n_stages.saturating_mul(dim), self.n_bits)?;
        let entries = rows.min(1 << self.n_bits);
        self.books(dim, entries, zeros("the codebooks", product(&[self.n_stages, entries, dim]))?)
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        self.finish(self.learn(data, ctx)?)
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        let (stages, bits) = stages_of(decoder, ctx)?;
        let ctx = ctx.clone();
        Ok(Box::new(move |rows: Matrix, out: &mut [u8]| {
            let mut beams = Beams::new(rows.rows());
            stages.extend_all(rows, &mut beams, self.beam_width, &ctx)?;
            let bytes = out.len() / rows.rows();
            for (row, code) in out.chunks_mut(bytes).enumerate() {
                pack(beams.best(row), bits, code);
            }
            Ok(())
        }))
    }
}

/// Writes a row of codes.
pub(super) fn pack(fields: &[u16], bits: u32, code: &mut [u8]) {
    bits::pack(fields.iter().map(|field| u32::from(*field)), bits, code);
}
