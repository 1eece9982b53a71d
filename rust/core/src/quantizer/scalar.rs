//! Scalar quantization: each value becomes a small number, with scales per row, column or block.
//!
//! Affine ranges after Jacob et al. (2018); ranges clipped to the least squared error after Guan et al. (2019), here by
//! a scan of shrunk ranges and then alternating least squares. Numbers are quantized with the scales as they are
//! stored, so that rounding a scale never costs more than it must.

use super::scales::{factor, too_large, Chooser, Scales};
use super::{within, Encoder, Learned, Quantizer};
use crate::algo::levels::{best_levels, LevelTable};
use crate::bits;
use crate::decoder::{Decoder, Granularity, Levels, LevelsSpec, Number, ScaleDtype};
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

/// What a value becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    /// IEEE half precision.
    Float16,
    /// The upper half of a float32.
    Bfloat16,
    /// Eight bits: sign, four bits of exponent, three of mantissa, times a scale.
    Float8,
    /// Four bits: sign, two bits of exponent, one of mantissa, times a scale.
    Float4,
    /// Sixteen levels that normal values fill evenly, times a scale.
    Nf4,
    /// Sixteen levels of the row's own.
    Free4,
    /// Evenly spaced levels.
    Int8,
    Int6,
    Int5,
    Int4,
    Int3,
    Int2,
}

impl Dtype {
    /// What a decoder reads.
    fn number(self) -> Number {
        match self {
            Dtype::Float16 => Number::Float16,
            Dtype::Bfloat16 => Number::Bfloat16,
            Dtype::Float8 => Number::Table8,
            Dtype::Float4 | Dtype::Nf4 => Number::Table4,
            Dtype::Free4 => Number::Free4,
            Dtype::Int8 => Number::Int8,
            Dtype::Int6 => Number::Int6,
            Dtype::Int5 => Number::Int5,
            Dtype::Int4 => Number::Int4,
            Dtype::Int3 => Number::Int3,
            Dtype::Int2 => Number::Int2,
        }
    }

    /// The levels of a scale of 1, where they are not evenly spaced.
    fn table(self) -> Option<Vec<f32>> {
        match self {
            Dtype::Float8 => Some((0..=255).map(|code| small_float(code, 4, 3)).collect()),
            Dtype::Float4 => Some((0..16).map(|code| small_float(code, 2, 1)).collect()),
            Dtype::Nf4 => Some(NF4.to_vec()),
            _ => None,
        }
    }
}

/// The levels of Dettmers et al. (2023): quantiles of the normal distribution in [-1, 1], zero among them.
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.091050036,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
];

fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// The value of a float of few bits: sign, exponent, mantissa, from the highest bit. With four bits of exponent the two
/// codes of all ones are zero instead of NaN, so that every code can be read.
fn small_float(code: u32, exponent_bits: u32, mantissa_bits: u32) -> f32 {
    let mantissa = code & ((1 << mantissa_bits) - 1);
    let exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1);
    let bias = (1 << (exponent_bits - 1)) - 1;
    let (one, magnitude) = ((1 << mantissa_bits) as f32, code & ((1 << (exponent_bits + mantissa_bits)) - 1));
    let value = match exponent {
        _ if magnitude == 0x7f => 0.0,
        0 => mantissa as f32 / one * power_of_two(1 - bias),
        _ => (1.0 + mantissa as f32 / one) * power_of_two(exponent as i32 - bias),
    };
    if code == magnitude {
        value
    } else {
        -value
    }
}

/// Parameters of scalar quantization.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScalarQuantizer {
    dtype: Dtype,
    granularity: Granularity,
    block_size: usize,
    clip: Clip,
    symmetric: bool,
    scale_dtype: ScaleDtype,
}

impl Default for ScalarQuantizer {
    fn default() -> Self {
        ScalarQuantizer {
            dtype: Dtype::Int8,
            granularity: Granularity::Row,
            block_size: 64,
            clip: Clip::Mse,
            symmetric: false,
            scale_dtype: ScaleDtype::Float16,
        }
    }
}

/// Rows' offsets are float16 times a power of two that brings the fitted table's largest one near 2^8, as [`Scales`] are.
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
    /// How rows' scales are stored, and the factor of their float16 offsets; None where grids are stored as float32.
    stored: Option<(Scales, f32)>,
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
        let Some((scales, offset)) = self.stored else { return grid };
        let step = scales.round(grid.step);
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
        let Some((scales, _)) = self.stored else { return step };
        let rounded = scales.round(step);
        if rounded * steps < reach - rounded * 1e-3 {
            return scales.above(step);
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
        let centre = if self.symmetric { 0.0 } else { full.low + full.step * middle };
        let signs = self.stored.is_none_or(|(scales, _)| scales.dtype == ScaleDtype::Float16);
        let turns = self.symmetric && signs;
        for shrink in 1..=28 {
            ctx.check()?;
            let step = full.step * (1.0 - 0.03 * shrink as f32);
            // Below zero there is one level more than above: a negative step has it above.
            for step in [step, -step] {
                let grid = Grid { step, low: centre - step * middle };
                let error = if step > 0.0 || turns { grid.error(values, self.top) } else { f32::INFINITY };
                // More than rounding, which depends on the order of the values.
                if error < least * if step > 0.0 { 1.0 } else { 0.9999 } {
                    (best, least) = (grid, error);
                }
            }
        }
        for _ in 0..6 {
            ctx.check()?;
            let grid = best.refit(values, self.top, self.symmetric);
            let error = grid.error(values, self.top);
            if !(error < least && (grid.step > 0.0 || (turns && grid.step < 0.0))) {
                break;
            }
            (best, least) = (grid, error);
        }
        let best = self.rounded(best);
        let better = best.step != 0.0 && best.error(values, self.top) < full.error(values, self.top);
        Ok(if better { best } else { full })
    }
}

impl ScalarQuantizer {
    /// The defaults, but for scales by column.
    pub(super) fn by_column() -> Self {
        ScalarQuantizer { granularity: Granularity::Column, ..Default::default() }
    }

    /// The levels of a scale of 1, where they are not evenly spaced.
    fn table(&self) -> Option<LevelTable> {
        self.dtype.table().map(|levels| LevelTable::new(&levels))
    }

    /// Levels need no offset: a parameter says so, or they are no even grid.
    fn symmetric(&self) -> bool {
        self.symmetric || self.dtype.number().is_table() || self.dtype == Dtype::Free4
    }

    fn shares_columns(&self) -> bool {
        self.granularity == Granularity::Column && !self.dtype.number().is_float()
    }

    fn spec(&self, dim: usize) -> LevelsSpec {
        let mut spec = LevelsSpec {
            dim,
            dtype: self.dtype.number(),
            granularity: self.granularity,
            block_size: self.block_size,
            symmetric: self.symmetric(),
            scale_dtype: ScaleDtype::Float16,
            scale_factor: 1.0,
            offset_factor: 1.0,
        };
        if spec.shared().is_some() {
            spec.scale_dtype = self.scale_dtype;
        }
        spec
    }

    /// The decoder; `columns` holds scale and offset of each column, where columns share scales.
    fn decoder(&self, spec: LevelsSpec, columns: Option<(&[f32], &[f32])>) -> Result<Decoder> {
        Ok(Decoder::Levels(match self.dtype.table() {
            Some(table) => Levels::with_table(spec, &table, columns.map(|(scale, _)| scale))?,
            None => Levels::new(spec, columns)?,
        }))
    }

    fn rules(&self, stored: Option<(Scales, f32)>) -> Rules {
        let bits = self.dtype.number().bits();
        Rules { top: ((1u32 << bits) - 1) as f32, search: self.search(), symmetric: self.symmetric, stored }
    }

    fn search(&self) -> bool {
        self.clip == Clip::Mse && self.dtype.number().bits() <= 4
    }

    /// One grid a column, from all rows. A row's weight does not move the ranges.
    fn columns(&self, data: Sample, ctx: &Context) -> Result<Vec<Grid>> {
        let (rules, table) = (self.rules(None), self.table());
        ctx.stage("ranges", data.dim() as u64);
        ctx.map(data.dim(), |column| {
            let mut values = crate::error::reserved("a column", Some(data.len()))?;
            values.extend(data.rows.data().iter().skip(column).step_by(data.dim()));
            ctx.advance(1);
            if let Some(table) = &table {
                let chooser = Chooser { table, search: self.search(), stored: None };
                let mut places = crate::error::zeros("a column", Some(values.len()))?;
                return Ok(Grid { step: chooser.choose(&values, &mut places), low: 0.0 });
            }
            rules.choose(&values, ctx)
        })
    }

    /// The largest scale and the largest magnitude of any row or block.
    fn largest(&self, data: Sample, size: usize, ctx: &Context) -> Result<(f32, f32)> {
        let (rules, block) = (self.rules(None), 1024 * data.dim());
        let levels = self.table().map_or(1.0, |table| table.reach());
        let parts = ctx.map(data.rows.data().len().div_ceil(block), |index| {
            let rows = data.rows.data()[index * block..].chunks(data.dim()).take(1024);
            let grids = rows.flat_map(|row| row.chunks(size)).map(|values| {
                let (low, high) = range(values);
                let reach = low.abs().max(high.abs());
                if self.dtype.number().is_table() || self.dtype == Dtype::Free4 {
                    return (reach / levels, reach);
                }
                // A lower end is rounded down by at most a thousandth, which the steps must then cover as well.
                (rules.minmax(low, high).step + reach / (1000.0 * rules.top), reach)
            });
            Ok(grids.fold((0f32, 0f32), |(a, b), (c, d)| (a.max(c), b.max(d))))
        })?;
        Ok(parts.into_iter().fold((0f32, 0f32), |(a, b), (c, d)| (a.max(c), b.max(d))))
    }

    /// Writes rows whose levels are evenly spaced.
    fn encode_grids(&self, levels: &Levels, rows: Matrix, codes: &mut [u8], ctx: &Context) -> Result<()> {
        let spec = levels.spec();
        let rules =
            self.rules(Some((Scales { dtype: spec.scale_dtype, factor: spec.scale_factor }, spec.offset_factor)));
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
                        let grid = rules.choose(values, ctx)?;
                        steps[part * size..][..values.len()].fill(grid.step);
                        lows[part * size..][..values.len()].fill(grid.low);
                        grids.push(grid);
                    }
                    store(&grids, spec, &rules, &mut code[spec.level_bytes()..])?;
                    (&steps[..], &lows[..])
                }
            };
            (kernels::best().quantize)(row, &Grids { steps, lows, top: rules.top }, &mut fields);
            pack(&fields, spec.dtype.bits(), &mut code[..spec.level_bytes()]);
        }
        Ok(())
    }

    /// Writes rows whose levels stand in a table.
    fn encode_table(&self, levels: &Levels, table: &LevelTable, rows: Matrix, codes: &mut [u8]) -> Result<()> {
        let spec = levels.spec();
        let scales = Scales { dtype: spec.scale_dtype, factor: spec.scale_factor };
        let chooser = Chooser { table, search: self.search(), stored: Some(scales) };
        let mut fields = vec![0u8; spec.dim];
        for (index, code) in codes.chunks_mut(spec.row_bytes()).enumerate() {
            let (row, (places, pairs)) = (rows.row(index), code.split_at_mut(spec.level_bytes()));
            if let Some((columns, _)) = levels.columns() {
                for (t, scale) in columns.iter().enumerate() {
                    table.nearest(&row[t..=t], *scale, &mut fields[t..=t]);
                }
            } else {
                let size = spec.shared().unwrap_or(spec.dim);
                let blocks = row.chunks(size).zip(fields.chunks_mut(size));
                for ((values, fields), pair) in blocks.zip(pairs.chunks_mut(spec.pair_bytes())) {
                    scales.write(chooser.choose(values, fields), pair)?;
                }
            }
            pack(&fields, spec.dtype.bits(), places);
        }
        Ok(())
    }
}

/// Writes rows that have their own levels.
fn encode_free(spec: &LevelsSpec, rows: Matrix, codes: &mut [u8], ctx: &Context) -> Result<()> {
    let size = spec.shared().unwrap_or(spec.dim);
    let scales = Scales { dtype: ScaleDtype::Float16, factor: spec.scale_factor };
    let mut fields = vec![0u8; spec.dim];
    for (index, code) in codes.chunks_mut(spec.row_bytes()).enumerate() {
        ctx.check()?;
        let (places, pairs) = code.split_at_mut(spec.level_bytes());
        let blocks = rows.row(index).chunks(size).zip(fields.chunks_mut(size));
        for ((values, fields), pair) in blocks.zip(pairs.chunks_mut(spec.pair_bytes())) {
            let mut levels: Vec<f32> = best_levels(values, 16).iter().map(|level| scales.round(*level)).collect();
            levels.resize(16, levels[levels.len() - 1]);
            for (level, bytes) in levels.iter().zip(pair.chunks_mut(2)) {
                scales.write(*level, bytes)?;
            }
            LevelTable::new(&levels).nearest(values, 1.0, fields);
        }
        pack(&fields, 4, places);
    }
    Ok(())
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
        within("block_size", self.block_size, 1, 1 << 24)?;
        if self.dtype == Dtype::Free4 && self.granularity == Granularity::Column {
            return Err(Error::parameter("granularity", "column", "levels of their own are for rows and blocks"));
        }
        if self.scale_dtype == ScaleDtype::Float8 && self.dtype == Dtype::Free4 {
            return Err(Error::parameter("scale_dtype", "float8", "levels of the row's own are float16"));
        }
        if self.scale_dtype == ScaleDtype::Float8 && !self.symmetric() && !self.dtype.number().is_float() {
            return Err(Error::parameter("scale_dtype", "float8", "offsets need float16: add symmetric=True"));
        }
        Ok(())
    }

    fn blank(&self, _: usize, dim: usize) -> Result<Decoder> {
        let zeros = vec![0f32; dim];
        self.decoder(self.spec(dim), self.shares_columns().then_some((&zeros[..], &zeros[..])))
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        let mut spec = self.spec(data.dim());
        let mut columns = None;
        if self.shares_columns() {
            let grids = self.columns(data, ctx)?;
            columns = Some(grids.iter().map(|g| (g.step, g.low)).unzip::<f32, f32, Vec<f32>, Vec<f32>>());
        } else if let Some(size) = spec.shared() {
            let (scale, reach) = self.largest(data, size, ctx)?;
            spec.scale_factor = Scales::new(spec.scale_dtype, scale).factor;
            spec.offset_factor = factor(reach, HEADROOM);
        }
        let columns = columns.as_ref().map(|(scale, offset)| (&scale[..], &offset[..]));
        Ok(Learned { decoder: self.decoder(spec, columns)?, codes: None, n_iter: 1, notes: Vec::new() })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        let Decoder::Levels(levels) = decoder else {
            return Err(Error::shape("the decoder", decoder.form(), "the form levels"));
        };
        let (spec, ctx) = (levels.spec(), ctx.clone());
        if spec.dtype.is_float() {
            return Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| cast(rows, spec.dtype, codes)));
        }
        if spec.dtype == Number::Free4 {
            return Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| encode_free(spec, rows, codes, &ctx)));
        }
        if let Some(table) = levels.table().map(LevelTable::new) {
            return Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| {
                ctx.check()?;
                self.encode_table(levels, &table, rows, codes)
            }));
        }
        Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| self.encode_grids(levels, rows, codes, &ctx)))
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
pub(super) fn pack(levels: &[u8], bits: u32, code: &mut [u8]) {
    match bits {
        8 => code.copy_from_slice(levels),
        4 => pack_bytes::<2>(levels, code),
        2 => pack_bytes::<4>(levels, code),
        _ => bits::pack(levels.iter().map(|level| u32::from(*level)), bits, code),
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
fn store(grids: &[Grid], spec: &LevelsSpec, rules: &Rules, code: &mut [u8]) -> Result<()> {
    let Some((scales, offset)) = rules.stored else { return Ok(()) };
    for (grid, pair) in grids.iter().zip(code.chunks_exact_mut(spec.pair_bytes())) {
        scales.write(grid.step, pair)?;
        if !spec.symmetric {
            let low = f16::from_f32(grid.low / offset);
            if !low.is_finite() {
                return Err(too_large());
            }
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
                let scales = Scales { dtype: ScaleDtype::Float16, factor: 1.0 / 256.0 };
                let stored = Some((scales, 1.0 / 256.0));
                let searched = Rules { top, search: true, symmetric, stored };

                let full = Rules { search: false, ..searched };
                let choose = |rules: &Rules| rules.choose(&values, &Context::default()).unwrap();
                assert!(choose(&searched).error(&values, top) <= choose(&full).error(&values, top));
            }
        }
    }
}
