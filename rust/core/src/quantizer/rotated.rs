//! Rotation and the best levels of the normal distribution: TurboQuant (Zandieh et al., 2025), without any training.
//!
//! The values of a rotated row are nearly normal, whatever the row was, so that the levels of Lloyd and Max suit all of
//! them once the row has its scale. The scale with the least squared error costs nothing more than the row's norm, and a
//! longer one makes inner products unbiased: RaBitQ (Gao and Long, 2024).

use super::front::{Front, Turning};
use super::scalar::pack;
use super::scales::Scales;
use super::{within, Encoder, Learned, Quantizer};
use crate::algo::levels::LevelTable;
use crate::algo::lloyd_max::normal_levels;
use crate::decoder::{Decoder, Granularity, Levels, LevelsSpec, Number, ScaleDtype};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use serde::{Deserialize, Serialize};

/// What a row's scale is best for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Estimator {
    /// The least squared error of the decoded row.
    Squares,
    /// Inner products with decoded rows whose mean over all rotations is the true one.
    Unbiased,
}

/// Parameters of quantization after a rotation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RotatedQuantizer {
    n_bits: u32,
    estimator: Estimator,
    scale_dtype: ScaleDtype,
}

impl Default for RotatedQuantizer {
    fn default() -> Self {
        RotatedQuantizer { n_bits: 4, estimator: Estimator::Squares, scale_dtype: ScaleDtype::Float16 }
    }
}

/// Most rounds of levels for a scale and a scale for the levels.
const ROUNDS: usize = 10;

/// Rows that one task measures.
const BLOCK: usize = 1024;

/// The root mean square of a row's values: the scale at which they have the variance of the levels' normal distribution.
fn spread(row: &[f32]) -> f32 {
    let square: f64 = row.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
    (square / row.len() as f64).sqrt() as f32
}

impl RotatedQuantizer {
    fn decoder(&self, dim: usize, scale_factor: f32) -> Result<Decoder> {
        let spec = LevelsSpec {
            dim,
            dtype: Number::table(self.n_bits).unwrap_or(Number::Table8),
            granularity: Granularity::Row,
            block_size: 64,
            symmetric: true,
            scale_dtype: self.scale_dtype,
            scale_factor,
            offset_factor: 1.0,
        };
        Ok(Decoder::Levels(Levels::with_table(spec, &normal_levels(self.n_bits), None)?))
    }

    /// The scale of a row, as it will be read back; `places` become its levels.
    fn choose(&self, row: &[f32], table: &LevelTable, scales: Scales, places: &mut [u8]) -> f32 {
        let reach = row.iter().fold(0f32, |reach, value| reach.max(value.abs()));
        let (mut best, mut least) = (0.0, f64::INFINITY);
        let mut tried = vec![0u8; row.len()];
        // Short rows, and rows that are not normal, may stand on the levels with their largest value on the last one. The
        // more levels, the more scales are there of which none leads to the others.
        let middle = spread(row);
        let starts = [middle, reach / table.reach(), 0.85 * middle, 1.15 * middle];
        for start in starts.into_iter().take(if self.n_bits > 2 { 4 } else { 2 }) {
            let scale = table.refine(row, start, ROUNDS, &mut tried);
            let below = scales.round(scale);
            let coarse = self.scale_dtype == ScaleDtype::Float8;
            for stored in [below, if coarse { scales.above(scale) } else { below }] {
                if coarse {
                    table.nearest(row, stored, &mut tried);
                }
                let error = table.error(row, &tried, stored);
                if error < least {
                    (best, least) = (stored, error);
                    places.copy_from_slice(&tried);
                }
            }
        }
        if self.estimator == Estimator::Squares {
            return best;
        }
        // The decoded row's projection on the row is then the row itself, and the rest has no direction on average.
        let (product, _) = table.products(row, places);
        let norm: f64 = row.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
        scales.round(if product > 0.0 { (norm / product) as f32 } else { 0.0 })
    }
}

impl Quantizer for RotatedQuantizer {
    const NAME: &'static str = "rotated";
    const ABOUT: &'static str = "rows are rotated, and each value becomes a level of the normal distribution";
    const FRONT: Front = Front::rotated(Turning::Random);

    fn check(&self) -> Result<()> {
        within("n_bits", self.n_bits as usize, 1, 8)
    }

    fn blank(&self, _: usize, dim: usize) -> Result<Decoder> {
        self.decoder(dim, 1.0)
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        ctx.stage("scales", data.len() as u64);
        let parts = ctx.map(data.len().div_ceil(BLOCK), |index| {
            let rows = data.rows.data()[index * BLOCK * data.dim()..].chunks(data.dim()).take(BLOCK);
            Ok(rows.fold(0f32, |largest, row| largest.max(spread(row))))
        })?;
        let largest = parts.into_iter().fold(0f32, f32::max);
        let decoder = self.decoder(data.dim(), Scales::new(self.scale_dtype, largest).factor)?;
        Ok(Learned { decoder, codes: None, n_iter: 1, notes: Vec::new() })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        let levels = match decoder {
            Decoder::Levels(levels) => levels,
            _ => return Err(Error::shape("the decoder", decoder.form(), "the form levels")),
        };
        let Some(table) = levels.table().map(LevelTable::new) else {
            return Err(Error::shape("the decoder", "no table", "a table of levels"));
        };
        let (spec, ctx) = (levels.spec(), ctx.clone());
        let scales = Scales { dtype: spec.scale_dtype, factor: spec.scale_factor };
        Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| {
            ctx.check()?;
            let mut places = vec![0u8; spec.dim];
            for (index, code) in codes.chunks_mut(spec.row_bytes()).enumerate() {
                let scale = self.choose(rows.row(index), &table, scales, &mut places);
                let (fields, stored) = code.split_at_mut(spec.level_bytes());
                scales.write(scale, stored)?;
                pack(&places, spec.dtype.bits(), fields);
            }
            Ok(())
        }))
    }
}
