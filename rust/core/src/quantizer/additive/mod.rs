//! Additive quantization by local search (LSQ++: Martinez, Zakhmi, Hoos and Little, 2018): a row is a sum of entries, one
//! of each codebook, and no codebook comes before another.
//!
//! Unlike in the paper, the codebooks and codes of a residual quantizer are the start. Rounds of least squares for all
//! codebooks and of local search for all codes follow, with noise on the codebooks that falls to nothing (the paper's
//! SR-D): without it the search stays near the start. Where the rounds gain little, the residual quantizer's own
//! refinement is tried too, and the better result kept.

mod search;

use super::residual::beam::{Beams, Codes};
use super::residual::{pack, stages_of, Found, ResidualQuantizer};
use super::{check_loop, within, Encoder, Learned, Quantizer};
use crate::decoder::{CodebookDtype, Decoder};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use crate::rng::Rng;
use search::{check_pairs, kicks, Search};
use serde::{Deserialize, Serialize};

/// Parameters of additive quantization.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdditiveQuantizer {
    n_codebooks: usize,
    n_bits: u32,
    beam_width: usize,
    n_rounds: usize,
    n_searches: usize,
    n_perturbations: usize,
    noise: f64,
    max_iter: usize,
    tol: f64,
    codebook_dtype: CodebookDtype,
}

impl Default for AdditiveQuantizer {
    fn default() -> Self {
        AdditiveQuantizer {
            n_codebooks: 8,
            n_bits: 8,
            beam_width: 8,
            n_rounds: 25,
            n_searches: 16,
            n_perturbations: 2,
            noise: 0.55,
            max_iter: 25,
            tol: 1e-4,
            codebook_dtype: CodebookDtype::Float16,
        }
    }
}

/// Searches from a row's code in a round with noise: the next round moves the codebooks again.
const SEARCHES_OF_A_ROUND: usize = 1;

/// Least-squares steps of such a round, from the codebooks of the one before.
const STEPS: usize = 5;

/// Local searches of a row at the end of a fit.
const LAST_SEARCHES: usize = 8;

/// Where there are so many rows for each entry, and rounds to cool down in, rounds that leave at most this share of the
/// start's error are better than its refinement.
const CLEARLY_BETTER: f64 = 0.92;
const ROWS_PER_ENTRY: usize = 10;
const FULL_ROUNDS: usize = 15;

/// Rounds from the refined start, without noise: they go to the next minimum.
const QUIET_ROUNDS: usize = 5;

impl AdditiveQuantizer {
    /// Where the search starts from.
    fn residual(&self) -> ResidualQuantizer {
        ResidualQuantizer {
            n_stages: self.n_codebooks,
            n_bits: self.n_bits,
            beam_width: self.beam_width,
            max_iter: self.max_iter,
            tol: self.tol,
            codebook_dtype: self.codebook_dtype,
            ..ResidualQuantizer::default()
        }
    }

    /// Whether rounds that leave this share of the start's error are better than its refinement for sure. That gains most
    /// where there are few rows, and then takes little time.
    fn settles(&self, rows: usize, entries: usize, share: f64) -> bool {
        let many = rows >= ROWS_PER_ENTRY.saturating_mul(entries).saturating_mul(self.n_codebooks);
        many && self.n_rounds >= FULL_ROUNDS && share <= CLEARLY_BETTER
    }

    /// Goes back to earlier codebooks and codes where their error is no higher. Says whether it stayed, and the error.
    fn better(
        &self,
        data: Sample,
        found: &mut Found,
        (earlier, error): ((Vec<f32>, Codes), f64),
        ctx: &Context,
    ) -> Result<(bool, f64)> {
        let own = found.stages.error(data, &found.codes, ctx)?;
        if own < error {
            return Ok((true, own));
        }
        found.exchange(earlier, ctx)?;
        Ok((false, error))
    }

    /// Rounds of least squares and local search, the last one without noise and thorough.
    fn rounds(&self, data: Sample, found: &mut Found, noise: f64, count: usize, ctx: &Context) -> Result<()> {
        let rng = Rng::new(ctx.seed);
        let deviations = deviations(data);
        // Of what the codes at hand leave, for each book: the noise of all books together is `noise` of that.
        let energy = deviations.iter().map(|deviation| deviation * deviation).sum::<f64>() * data.total_weight();
        let left = found.stages.error(data, &found.codes, ctx)? / energy.max(f64::MIN_POSITIVE);
        let noise = noise * (left.min(1.0) / self.n_codebooks as f64).sqrt();
        let (books, entries) = (self.n_codebooks, found.stages.entries);
        let mut centers = found.stages.centers.clone();
        ctx.stage("local search", count as u64 + 1);
        for round in 0..count {
            centers = found.stages.refined(&centers, STEPS, data, &found.codes, ctx)?;
            let cooled = 1.0 - (round + 1) as f64 / count as f64;
            let noise = noise * cooled;
            let mut rng = rng.stream(round as u64);
            let noisy = centers.iter().zip(deviations.iter().cycle());
            let noisy =
                noisy.map(|(center, deviation)| (f64::from(*center) + noise * deviation * even(&mut rng)) as f32);
            found.stages.replace(noisy.collect(), ctx)?;
            let kicks = kicks(SEARCHES_OF_A_ROUND, self.n_perturbations, books, entries, &mut rng);
            Search::new(&found.stages, ctx)?.improve(&found.stages, data.rows, &mut found.codes, &kicks, ctx)?;
            ctx.advance(1);
        }
        found.stages.replace(centers, ctx)?;
        found.stages.refine(data, &found.codes, ctx)?;
        let kicks = kicks(LAST_SEARCHES, self.n_perturbations, books, entries, &mut rng.stream(u64::MAX));
        let mut fresh = found.codes.clone();
        Search::new(&found.stages, ctx)?.improve(&found.stages, data.rows, &mut fresh, &kicks, ctx)?;
        found.stages.keep_better(data.rows, &mut found.codes, fresh, ctx)?;
        ctx.advance(1);
        Ok(())
    }
}

/// The deviation of each column from its mean.
fn deviations(data: Sample) -> Vec<f64> {
    let dim = data.dim();
    // Relative to the largest, weights of any magnitude have good sums.
    let largest = data.weights.map_or(1.0, |weights| weights.iter().fold(0.0, |a: f64, b| a.max(*b)));
    let (mut total, mut sums, mut squares) = (0.0, vec![0f64; dim], vec![0f64; dim]);
    let origin = data.rows.row(0);
    for row in 0..data.len() {
        let weight = data.weight(row) / largest;
        total += weight;
        for (t, value) in data.rows.row(row).iter().enumerate() {
            let value = f64::from(*value) - f64::from(origin[t]);
            sums[t] += weight * value;
            squares[t] += weight * value * value;
        }
    }
    let variance = |(sum, square): (&f64, &f64)| (square / total - (sum / total).powi(2)).max(0.0);
    sums.iter().zip(&squares).map(variance).map(f64::sqrt).collect()
}

/// An evenly distributed number of variance 1: no logarithm, whose last bit may differ between machines.
fn even(rng: &mut Rng) -> f64 {
    (2.0 * rng.uniform() - 1.0) * 1.732_050_807_568_877_2
}

impl Quantizer for AdditiveQuantizer {
    const NAME: &'static str = "additive";
    const ABOUT: &'static str = "a row is a sum of entries, one from each codebook, chosen together by local search";

    fn check(&self) -> Result<()> {
        within("n_codebooks", self.n_codebooks, 1, 1 << 12)?;
        within("n_bits", self.n_bits as usize, 1, 16)?;
        within("beam_width", self.beam_width, 1, 1 << 12)?;
        within("n_rounds", self.n_rounds, 0, 1000)?;
        within("n_searches", self.n_searches, 0, 10_000)?;
        within("n_perturbations", self.n_perturbations, 1, 1 << 12)?;
        if !(0.0..=100.0).contains(&self.noise) {
            return Err(Error::parameter("noise", self.noise, "must be from 0 to 100"));
        }
        check_loop(self.max_iter, self.tol)
    }

    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder> {
        check_pairs(self.n_codebooks, rows.min(1 << self.n_bits))?;
        self.residual().blank(rows, dim)
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        check_pairs(self.n_codebooks, data.len().min(1 << self.n_bits))?;
        let residual = self.residual();
        let mut found = residual.start(data, ctx)?;
        if self.n_rounds == 0 || self.n_codebooks == 1 {
            residual.refine(data, &mut found, ctx)?;
            return residual.finish(found);
        }
        let start = (found.stages.centers.clone(), found.codes.clone());
        let before = found.stages.error(data, &found.codes, ctx)?;
        self.rounds(data, &mut found, self.noise, self.n_rounds, ctx)?;
        let after = found.stages.error(data, &found.codes, ctx)?;
        if !self.settles(data.len(), found.stages.entries, after / before) {
            let searched = found.exchange(start, ctx)?;
            residual.refine(data, &mut found, ctx)?;
            let (refined, least) = self.better(data, &mut found, (searched, after), ctx)?;
            // From here without noise, which led nowhere.
            if refined {
                let kept = (found.stages.centers.clone(), found.codes.clone());
                self.rounds(data, &mut found, 0.0, self.n_rounds.min(QUIET_ROUNDS), ctx)?;
                self.better(data, &mut found, (kept, least), ctx)?;
            }
        }
        residual.finish(found)
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        let (stages, bits) = stages_of(decoder, ctx)?;
        let books = stages.len();
        let kicks = kicks(self.n_searches, self.n_perturbations, books, stages.entries, &mut Rng::new(0));
        let search = Search::new(&stages, ctx)?;
        let ctx = ctx.serial();
        Ok(Box::new(move |rows: Matrix, out: &mut [u8]| {
            let mut beams = vec![Beams::new(rows.rows())];
            stages.extend_all(rows, &mut beams[0], self.beam_width, &ctx)?;
            let mut codes = Codes::of(&beams);
            let mut fresh = codes.clone();
            search.improve_block(&stages, rows, &mut fresh.values, &kicks, &ctx)?;
            stages.keep_better(rows, &mut codes, fresh, &ctx)?;
            let bytes = out.len() / rows.rows();
            for (row, code) in out.chunks_mut(bytes).enumerate() {
                pack(codes.row(row), bits, code);
            }
            Ok(())
        }))
    }
}
