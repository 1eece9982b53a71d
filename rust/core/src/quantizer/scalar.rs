//! Scalar quantization: each value becomes a small number, with scales per row, column or block.
//!
//! Affine ranges after Jacob et al. (2018); ranges clipped to the least squared error after Guan et al. (2019), here by
//! a scan of shrunk ranges and then alternating least squares. Numbers are quantized with the scales as they are
//! stored, so that rounding a scale never costs more than it must.

use super::{within, Encoder, Learned, Quantizer};
use crate::bits;
use crate::decoder::{Decoder, Granularity, Levels, LevelsSpec, Number};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// How a range is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Clip {
    /// The least squared error, at 4 bits and less; above that clipping gains nothing and this is `minmax`.
    Mse,
    /// From the smallest to the largest value.
    Minmax,
}

/// Parameters of scalar quantization.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScalarQuantizer {
    dtype: Number,
    granularity: Granularity,
    block_size: usize,
    clip: Clip,
    symmetric: bool,
}

impl Default for ScalarQuantizer {
    fn default() -> Self {
        ScalarQuantizer {
            dtype: Number::Int8,
            granularity: Granularity::Row,
            block_size: 64,
            clip: Clip::Mse,
            symmetric: false,
        }
    }
}

/// Rows' scales are float16 times a power of two that brings the fitted table's largest one near 2^8: new rows may be
/// 100 times larger, and rows 10^6 times smaller than the largest keep full precision.
const HEADROOM: i32 = 8;

/// A grid of levels: value = level * step + low.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Grid {
    step: f32,
    low: f32,
}

impl Grid {
    /// The nearest level, halves up. A division, because the inverse of a denormal step overflows.
    #[inline]
    fn level(self, value: f32, top: f32) -> u32 {
        if self.step == 0.0 {
            return 0;
        }
        ((value - self.low) / self.step + 0.5).clamp(0.0, top + 0.5) as u32
    }

    /// Squared error of the values on this grid.
    fn error(self, values: &[f32], top: f32) -> f32 {
        // Multiplying by the inverse lets the loop run in vectors; a search needs no exact ties.
        let inverse = if self.step == 0.0 { 0.0 } else { 1.0 / self.step };
        let mut lanes = [0f32; 16];
        let add = |lane: &mut f32, value: &f32| {
            let level = ((value - self.low) * inverse + 0.5).clamp(0.0, top + 0.5) as i32 as f32;
            let difference = value - (level * self.step + self.low);
            *lane += difference * difference;
        };
        let whole = values.chunks_exact(16);
        whole.remainder().iter().zip(&mut lanes).for_each(|(v, lane)| add(lane, v));
        whole.for_each(|chunk| lanes.iter_mut().zip(chunk).for_each(|(lane, v)| add(lane, v)));
        lanes.iter().sum()
    }

    /// One step of alternating least squares: levels for this grid, then the best grid for those levels.
    fn refit(self, values: &[f32], top: f32, symmetric: bool) -> Grid {
        let middle = (top + 1.0) / 2.0;
        let (mut sum_q, mut sum_qq, mut sum_x, mut sum_qx) = (0f64, 0f64, 0f64, 0f64);
        for value in values {
            let level = self.level(*value, top) as f32;
            let (q, x) = (f64::from(if symmetric { level - middle } else { level }), f64::from(*value));
            sum_q += q;
            sum_qq += q * q;
            sum_x += x;
            sum_qx += q * x;
        }
        if symmetric {
            let step = if sum_qq > 0.0 { (sum_qx / sum_qq) as f32 } else { self.step };
            return Grid { step, low: -step * middle };
        }
        let count = values.len() as f64;
        let spread = count * sum_qq - sum_q * sum_q;
        if spread <= 0.0 {
            return self;
        }
        let step = (count * sum_qx - sum_q * sum_x) / spread;
        Grid { step: step as f32, low: ((sum_x - step * sum_q) / count) as f32 }
    }
}

/// How grids are chosen and stored.
#[derive(Clone, Copy)]
struct Rules {
    top: f32,
    search: bool,
    symmetric: bool,
    /// Factors of rows' float16 scales; None where grids are stored as float32.
    stored: Option<(f32, f32)>,
}

impl Rules {
    /// The grid from the smallest to the largest value.
    fn minmax(&self, low: f32, high: f32) -> Grid {
        if self.symmetric {
            let (middle, reach) = ((self.top + 1.0) / 2.0, low.abs().max(high.abs()));
            let step = self.round_step(reach / (middle - 1.0).max(1.0), reach, (middle - 1.0).max(1.0));
            return Grid { step, low: -step * middle };
        }
        let low = self.round_low(low);
        Grid { step: self.round_step((high - low) / self.top, high - low, self.top), low }
    }

    /// A grid as it will be read back.
    fn rounded(&self, grid: Grid) -> Grid {
        let Some((scale, offset)) = self.stored else { return grid };
        let step = f16::from_f32(grid.step / scale).to_f32() * scale;
        let low = if self.symmetric {
            -step * ((self.top + 1.0) / 2.0)
        } else {
            f16::from_f32(grid.low / offset).to_f32() * offset
        };
        Grid { step, low }
    }

    /// A step as it will be read back, large enough that `steps` of it cover `reach` (to a thousandth of a step, so
    /// that values on a grid find that grid again).
    fn round_step(&self, step: f32, reach: f32, steps: f32) -> f32 {
        let Some((scale, _)) = self.stored else { return step };
        let half = f16::from_f32(step / scale);
        let rounded = half.to_f32() * scale;
        if rounded * steps < reach - rounded * 1e-3 {
            return f16::from_bits(half.to_bits() + 1).to_f32() * scale;
        }
        rounded
    }

    /// A lower end as it will be read back: at or below `low`.
    fn round_low(&self, low: f32) -> f32 {
        let Some((_, offset)) = self.stored else { return low };
        let half = f16::from_f32(low / offset);
        if half.to_f32() * offset <= low {
            return half.to_f32() * offset;
        }
        // One float16 down: away from zero for negative numbers, towards it for positive ones.
        let bits = half.to_bits();
        let down = if bits == 0 {
            0x8001
        } else if bits & 0x8000 != 0 {
            bits + 1
        } else {
            bits - 1
        };
        f16::from_bits(down).to_f32() * offset
    }

    /// The grid for some values.
    fn choose(&self, values: &[f32]) -> Grid {
        let (low, high) = range(values);
        let full = self.minmax(low, high);
        if !self.search || full.step == 0.0 {
            return full;
        }
        // Shrunk ranges around the middle of the full one: clipping outliers pays more the fewer the levels.
        let (mut best, mut least) = (full, full.error(values, self.top));
        let middle = (self.top + if self.symmetric { 1.0 } else { 0.0 }) / 2.0;
        let centre = full.low + full.step * middle;
        for shrink in 1..=28 {
            let step = full.step * (1.0 - 0.03 * shrink as f32);
            let grid = Grid { step, low: centre - step * middle };
            let error = grid.error(values, self.top);
            if error < least {
                (best, least) = (grid, error);
            }
        }
        for _ in 0..6 {
            let grid = best.refit(values, self.top, self.symmetric);
            let error = grid.error(values, self.top);
            if !(error < least && grid.step > 0.0) {
                break;
            }
            (best, least) = (grid, error);
        }
        let best = self.rounded(best);
        if best.step > 0.0 && best.error(values, self.top) < full.error(values, self.top) {
            best
        } else {
            full
        }
    }
}

/// The power of two p with `largest` / p in [2^HEADROOM, 2^(HEADROOM + 1)), or the smallest normal one.
fn factor(largest: f32) -> f32 {
    let exponent = ((largest.to_bits() >> 23) as i32 - 127 - HEADROOM).clamp(-126, 127);
    if largest == 0.0 {
        return 1.0;
    }
    f32::from_bits(((exponent + 127) as u32) << 23)
}

impl ScalarQuantizer {
    fn spec(&self, dim: usize) -> LevelsSpec {
        LevelsSpec {
            dim,
            dtype: self.dtype,
            granularity: self.granularity,
            block_size: self.block_size,
            symmetric: self.symmetric,
            scale_factor: 1.0,
            offset_factor: 1.0,
        }
    }

    fn rules(&self, stored: Option<(f32, f32)>) -> Rules {
        let bits = self.dtype.bits();
        let search = self.clip == Clip::Mse && bits <= 4;
        Rules { top: ((1u32 << bits) - 1) as f32, search, symmetric: self.symmetric, stored }
    }

    /// One grid a column, from all rows. A row's weight does not move the ranges.
    fn columns(&self, data: Sample, ctx: &Context) -> Result<Vec<Grid>> {
        let rules = self.rules(None);
        ctx.stage("ranges", data.dim() as u64);
        ctx.map(data.dim(), |column| {
            let values: Vec<f32> = data.rows.data().iter().skip(column).step_by(data.dim()).copied().collect();
            ctx.advance(1);
            Ok(rules.choose(&values))
        })
    }

    /// The powers of two that rows' scales and offsets are stored relative to.
    fn factors(&self, data: Sample, size: usize, ctx: &Context) -> Result<(f32, f32)> {
        let rules = self.rules(None);
        let block = 1024 * data.dim();
        let parts = ctx.map(data.rows.data().len().div_ceil(block), |index| {
            let rows = data.rows.data()[index * block..].chunks(data.dim()).take(1024);
            let grids = rows.flat_map(|row| row.chunks(size)).map(|values| {
                let (low, high) = range(values);
                let reach = low.abs().max(high.abs());
                // A lower end is rounded down by at most a thousandth, which the steps must then cover as well.
                (rules.minmax(low, high).step + reach / (1000.0 * rules.top), reach)
            });
            Ok(grids.fold((0f32, 0f32), |(a, b), (c, d)| (a.max(c), b.max(d))))
        })?;
        let (step, reach) = parts.into_iter().fold((0f32, 0f32), |(a, b), (c, d)| (a.max(c), b.max(d)));
        Ok((factor(step), factor(reach)))
    }
}

/// Smallest and largest value.
fn range(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (if *v < l { *v } else { l }, if *v > h { *v } else { h }))
}

impl Quantizer for ScalarQuantizer {
    const NAME: &'static str = "scalar";
    const ABOUT: &'static str = "each value becomes a small number, with scales per row, column or block";

    fn check(&self) -> Result<()> {
        within("block_size", self.block_size, 1, 1 << 24)
    }

    fn blank(&self, _: usize, dim: usize) -> Result<Decoder> {
        let zeros = vec![0f32; dim];
        let by_column = self.granularity == Granularity::Column && !self.dtype.is_float();
        let columns = by_column.then_some((&zeros[..], &zeros[..]));
        Ok(Decoder::Levels(Levels::new(self.spec(dim), columns)?))
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        let mut spec = self.spec(data.dim());
        let mut columns = None;
        if self.granularity == Granularity::Column && !self.dtype.is_float() {
            let grids = self.columns(data, ctx)?;
            columns = Some(grids.iter().map(|g| (g.step, g.low)).unzip::<f32, f32, Vec<f32>, Vec<f32>>());
        } else if let Some(size) = spec.shared() {
            (spec.scale_factor, spec.offset_factor) = self.factors(data, size, ctx)?;
        }
        let columns = columns.as_ref().map(|(scale, offset)| (&scale[..], &offset[..]));
        let decoder = Decoder::Levels(Levels::new(spec, columns)?);
        Ok(Learned { decoder, codes: None, n_iter: 1, notes: Vec::new() })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, _: &Context) -> Result<Encoder<'a>> {
        let Decoder::Levels(levels) = decoder else {
            return Err(Error::shape("the decoder", decoder.form(), "the form levels"));
        };
        let spec = levels.spec();
        let rules = self.rules(Some((spec.scale_factor, spec.offset_factor)));
        Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| {
            let mut grids = Vec::new();
            for (index, code) in codes.chunks_mut(spec.row_bytes()).enumerate() {
                let row = rows.row(index);
                match (spec.dtype, levels.columns()) {
                    (Number::Float16 | Number::Bfloat16, _) => cast(row, spec.dtype, code)?,
                    (_, Some((step, low))) => {
                        let grid = |column: usize| Grid { step: step[column], low: low[column] };
                        pack(row, grid, &rules, spec, code);
                    }
                    (_, None) => {
                        let size = spec.shared().unwrap_or(spec.dim);
                        grids.clear();
                        grids.extend(row.chunks(size).map(|values| rules.choose(values)));
                        pack(row, |column| grids[column / size], &rules, spec, code);
                        store(&grids, spec, &mut code[spec.level_bytes()..])?;
                    }
                }
            }
            Ok(())
        }))
    }
}

/// Writes a row as float16 or bfloat16, rounded to nearest even.
fn cast(row: &[f32], dtype: Number, code: &mut [u8]) -> Result<()> {
    for (value, bytes) in row.iter().zip(code.chunks_exact_mut(2)) {
        let (stored, finite) = match dtype {
            Number::Float16 => (f16::from_f32(*value).to_le_bytes(), f16::from_f32(*value).is_finite()),
            _ => (bf16::from_f32(*value).to_le_bytes(), true),
        };
        if !finite {
            return Err(Error::OutOfRange {
                what: format!("{value:e} does not fit float16 (largest 65504)"),
                why: "use dtype=\"bfloat16\" or an integer type, or scale the table down".into(),
            });
        }
        bytes.copy_from_slice(&stored);
    }
    Ok(())
}

/// Writes the levels of a row.
fn pack(row: &[f32], grid: impl Fn(usize) -> Grid, rules: &Rules, spec: &LevelsSpec, code: &mut [u8]) {
    let levels = row.iter().enumerate().map(|(column, value)| grid(column).level(*value, rules.top));
    bits::pack(levels, spec.dtype.bits(), &mut code[..spec.level_bytes()]);
}

/// Writes the scales of a row after its levels.
fn store(grids: &[Grid], spec: &LevelsSpec, code: &mut [u8]) -> Result<()> {
    for (grid, pair) in grids.iter().zip(code.chunks_exact_mut(spec.pair_bytes())) {
        let step = f16::from_f32(grid.step / spec.scale_factor);
        let low = f16::from_f32(grid.low / spec.offset_factor);
        if !(step.is_finite() && (spec.symmetric || low.is_finite())) {
            return Err(Error::OutOfRange {
                what: "a row is more than 100 times larger than any row that was fitted".into(),
                why: "fit again with rows like it".into(),
            });
        }
        pair[..2].copy_from_slice(&step.to_le_bytes());
        if !spec.symmetric {
            pair[2..].copy_from_slice(&low.to_le_bytes());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn a_step_of_least_squares_never_raises_the_error() {
        let mut rng = Rng::new(5);
        for symmetric in [false, true] {
            let rules = Rules { top: 15.0, search: false, symmetric, stored: None };
            let values: Vec<f32> = (0..100).map(|_| rng.normal() as f32).collect();
            let mut grid = rules.minmax(-3.0, 3.0);
            for _ in 0..8 {
                let next = grid.refit(&values, 15.0, symmetric);
                assert!(next.error(&values, 15.0) <= grid.error(&values, 15.0) * 1.0001, "{grid:?} {next:?}");
                grid = next;
            }
        }
    }

    #[test]
    fn searched_ranges_are_never_worse_than_full_ones() {
        let mut rng = Rng::new(6);
        for top in [3.0, 15.0] {
            for symmetric in [false, true] {
                let values: Vec<f32> = (0..64).map(|_| rng.normal() as f32).collect();
                let searched = Rules { top, search: true, symmetric, stored: Some((1.0 / 256.0, 1.0 / 256.0)) };
                let full = Rules { search: false, ..searched };
                assert!(searched.choose(&values).error(&values, top) <= full.choose(&values).error(&values, top));
            }
        }
    }
}
