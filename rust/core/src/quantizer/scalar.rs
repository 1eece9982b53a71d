//! Scalar quantization: each value becomes a small number, with scales per row, column or block.
//!
//! Affine ranges after Jacob et al. (2018); ranges clipped to the least squared error after Guan et al. (2019), here by
//! a scan of shrunk ranges and then alternating least squares. Numbers are quantized with the scales as they are
//! stored, so that rounding a scale never costs more than it must.

use super::{within, Encoder, Learned, Quantizer};
use crate::decoder::{Decoder, Granularity, Levels, LevelsSpec, Number};
use crate::error::{Error, Result};
use crate::kernels::{self, Grids};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
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

/// Values that are quantized at a time, and sums that run side by side.
const RUN: usize = 256;
const LANES: usize = 8;

/// A grid of levels: value = level * step + low.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Grid {
    step: f32,
    low: f32,
}

impl Grid {
    /// Squared error of the values on this grid.
    fn error(self, values: &[f32], top: f32) -> f32 {
        (kernels::best().grid_error)(values, self.step, self.low, top)
    }

    /// One step of alternating least squares: levels for this grid, then the best grid for those levels.
    fn refit(self, values: &[f32], top: f32, symmetric: bool) -> Grid {
        let middle = (top + 1.0) / 2.0;
        let (steps, lows) = ([self.step; RUN], [self.low; RUN]);
        let mut levels = [0u8; RUN];
        // Sums over each place of the runs: these loops have no long chains of additions.
        let mut sums = [[0f64; LANES]; 4];
        for values in values.chunks(RUN) {
            let count = values.len();
            let grids = Grids { steps: &steps[..count], lows: &lows[..count], top };
            (kernels::best().quantize)(values, &grids, &mut levels[..count]);
            for (values, levels) in values.chunks(LANES).zip(levels.chunks(LANES)) {
                for (lane, (value, level)) in values.iter().zip(levels).enumerate() {
                    let level = f32::from(*level);
                    let (q, x) = (f64::from(if symmetric { level - middle } else { level }), f64::from(*value));
                    sums[0][lane] += q;
                    sums[1][lane] += q * q;
                    sums[2][lane] += x;
                    sums[3][lane] += q * x;
                }
            }
        }
        let [sum_q, sum_qq, sum_x, sum_qx] = sums.map(|lanes| lanes.iter().sum::<f64>());
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
    fn choose(&self, values: &[f32], ctx: &Context) -> Result<Grid> {
        let (low, high) = range(values);
        let full = self.minmax(low, high);
        if !self.search || full.step == 0.0 {
            return Ok(full);
        }
        // Shrunk ranges around the middle of the full one: clipping outliers pays more the fewer the levels.
        let (mut best, mut least) = (full, full.error(values, self.top));
        let middle = (self.top + if self.symmetric { 1.0 } else { 0.0 }) / 2.0;
        let centre = full.low + full.step * middle;
        for shrink in 1..=28 {
            ctx.check()?;
            let step = full.step * (1.0 - 0.03 * shrink as f32);
            let grid = Grid { step, low: centre - step * middle };
            let error = grid.error(values, self.top);
            if error < least {
                (best, least) = (grid, error);
            }
        }
        for _ in 0..6 {
            ctx.check()?;
            let grid = best.refit(values, self.top, self.symmetric);
            let error = grid.error(values, self.top);
            if !(error < least && grid.step > 0.0) {
                break;
            }
            (best, least) = (grid, error);
        }
        let best = self.rounded(best);
        let better = best.step > 0.0 && best.error(values, self.top) < full.error(values, self.top);
        Ok(if better { best } else { full })
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
    /// The defaults, but for scales by column.
    pub(super) fn by_column() -> Self {
        ScalarQuantizer { granularity: Granularity::Column, ..Default::default() }
    }

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
            rules.choose(&values, ctx)
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
    // Side by side, so that the loop runs in vectors.
    let mut lanes = [(f32::MAX, f32::MIN); LANES];
    for values in values.chunks(LANES) {
        for ((low, high), value) in lanes.iter_mut().zip(values) {
            *low = if value < low { *value } else { *low };
            *high = if value > high { *value } else { *high };
        }
    }
    lanes.iter().fold((f32::MAX, f32::MIN), |(low, high), lane| (low.min(lane.0), high.max(lane.1)))
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

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        let Decoder::Levels(levels) = decoder else {
            return Err(Error::shape("the decoder", decoder.form(), "the form levels"));
        };
        let spec = levels.spec();
        let rules = self.rules(Some((spec.scale_factor, spec.offset_factor)));
        let ctx = ctx.clone();
        Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| {
            if spec.dtype.is_float() {
                return cast(rows, spec.dtype, codes);
            }
            let size = spec.shared().unwrap_or(spec.dim);
            let (mut steps, mut lows) = (vec![0f32; spec.dim], vec![0f32; spec.dim]);
            let (mut grids, mut fields) = (Vec::new(), vec![0u8; spec.dim]);
            for (index, code) in codes.chunks_mut(spec.row_bytes()).enumerate() {
                let row = rows.row(index);
                let (steps, lows) = match levels.columns() {
                    Some(columns) => columns,
                    None => {
                        grids.clear();
                        for (part, values) in row.chunks(size).enumerate() {
                            let grid = rules.choose(values, &ctx)?;
                            steps[part * size..][..values.len()].fill(grid.step);
                            lows[part * size..][..values.len()].fill(grid.low);
                            grids.push(grid);
                        }
                        store(&grids, spec, &mut code[spec.level_bytes()..])?;
                        (&steps[..], &lows[..])
                    }
                };
                (kernels::best().quantize)(row, &Grids { steps, lows, top: rules.top }, &mut fields);
                pack(&fields, spec.dtype.bits(), &mut code[..spec.level_bytes()]);
            }
            Ok(())
        }))
    }
}

/// Writes rows as float16 or bfloat16, rounded to nearest even.
fn cast(rows: Matrix, dtype: Number, codes: &mut [u8]) -> Result<()> {
    for (values, codes) in rows.data().chunks(RUN).zip(codes.chunks_mut(2 * RUN)) {
        let mut stored = [0u16; RUN];
        let stored = &mut stored[..values.len()];
        match dtype {
            Number::Float16 => stored.reinterpret_cast_mut::<f16>().convert_from_f32_slice(values),
            _ => stored.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(values),
        }
        let finite = |bits: &u16| f16::from_bits(*bits).is_finite();
        if dtype == Number::Float16 && !stored.iter().fold(true, |all, bits| all & finite(bits)) {
            let value = values.iter().zip(stored.iter()).find(|(_, bits)| !finite(bits)).map_or(0.0, |(v, _)| *v);
            return Err(Error::OutOfRange {
                what: format!("{value:e} does not fit float16 (largest 65504)"),
                why: "use dtype=\"bfloat16\" or an integer type, or scale the table down".into(),
            });
        }
        for (bits, bytes) in stored.iter().zip(codes.chunks_exact_mut(2)) {
            bytes.copy_from_slice(&bits.to_le_bytes());
        }
    }
    Ok(())
}

/// Writes the levels of a row: `bits` of each, low bits first.
fn pack(levels: &[u8], bits: u32, code: &mut [u8]) {
    match bits {
        8 => code.copy_from_slice(levels),
        4 => pack_bytes::<2>(levels, code),
        _ => pack_bytes::<4>(levels, code),
    }
}

/// `COUNT` levels a byte.
fn pack_bytes<const COUNT: usize>(levels: &[u8], code: &mut [u8]) {
    let join = |levels: &[u8]| levels.iter().rev().fold(0, |byte: u8, level| byte << (8 / COUNT) | level);
    let whole = levels.chunks_exact(COUNT);
    if let [.., last] = code {
        *last = join(whole.remainder());
    }
    code.iter_mut().zip(whole).for_each(|(byte, levels)| *byte = join(levels));
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
                let choose = |rules: &Rules| rules.choose(&values, &Context::default()).unwrap();
                assert!(choose(&searched).error(&values, top) <= choose(&full).error(&values, top));
            }
        }
    }
}
