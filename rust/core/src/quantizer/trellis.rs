//! Trellis coding (Tseng, Sun, Hou and De Sa, QTIP, 2024): see [`crate::algo::trellis`]. Unlike the paper, columns of any
//! variance share a stream: each gets the bits that reverse water-filling gives it, fractions of bits too.

use super::{within, Encoder, Front, Learned, Quantizer, Turning};
use crate::algo::trellis::{self, even_bits, Layout, Search, MOST_BITS, MOST_STATE_BITS};
use crate::decoder::{Decoder, Trellis, TrellisSpec, MOST_SCALE_BITS};
use crate::error::{product, Error, Result};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use serde::{Deserialize, Serialize};

/// Which columns the bits of a row go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Allocation {
    /// To all alike.
    Even,
    /// To those of large variance.
    Variance,
}

/// Parameters of trellis coding.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrellisQuantizer {
    n_bits: f64,
    state_bits: u32,
    bit_allocation: Allocation,
    scale_bits: Option<u32>,
}

impl Default for TrellisQuantizer {
    fn default() -> Self {
        TrellisQuantizer { n_bits: 2.0, state_bits: 12, bit_allocation: Allocation::Even, scale_bits: None }
    }
}

/// Scale bits that a fit chooses from.
const CHOSEN_SCALE_BITS: u32 = 4;

/// Rows whose scales are looked at, and rows that sums take at a time.
const SCALED_ROWS: usize = 1 << 16;
const SUM_ROWS: usize = 1 << 12;

/// Bytes of ways back that a search may keep.
const MOST_WAYS: usize = 1 << 31;

/// Best width of the levels for columns of variance 1, by how many more bits a window has than a column adds: with few of
/// them no stream comes near the outermost levels often enough, and levels do better further apart. Measured.
const WIDTHS: [f64; 13] = [1.5, 1.45, 1.4, 1.28, 1.2, 1.16, 1.12, 1.09, 1.06, 1.04, 1.02, 1.01, 1.0];

/// What levels are multiplied by for a column of variance 1 that has `rate` bits: what is left out of a code is not in
/// the variance of the values that it stands for either.
fn width(rate: f64, state_bits: u32) -> f64 {
    let memory = (f64::from(state_bits) - rate).clamp(0.0, 12.0);
    let (below, share) = (memory as usize, memory.fract());
    let wide = WIDTHS[below] + share * (WIDTHS[(below + 1).min(12)] - WIDTHS[below]);
    // With less than a bit, streams fall short of what they could be.
    let sparse = 1.0 - 0.1 * (1.0 - rate).max(0.0);
    wide * sparse * (1.0 - (-2.0 * rate.max(0.05) * std::f64::consts::LN_2).exp()).sqrt()
}

/// Bits of each column, fractions too, that sum up to `bits`: those of least error for these variances, as far as a column
/// may have them; what then is left over goes to the others.
fn water_filling(variances: &[f64], bits: f64) -> Vec<f64> {
    let most = f64::from(MOST_BITS);
    let rates = |level: f64| -> Vec<f64> {
        let rate = |variance: &f64| (0.5 * (variance.log2() - level)).clamp(0.0, most);
        variances.iter().map(|v| if *v > 0.0 { rate(v) } else { 0.0 }).collect()
    };
    let logarithms = || variances.iter().filter(|v| **v > 0.0).map(|v| v.log2());
    let high = logarithms().fold(f64::NEG_INFINITY, f64::max);
    let low = logarithms().fold(f64::INFINITY, f64::min) - 2.0 * most;
    if high == f64::NEG_INFINITY {
        return vec![bits / variances.len() as f64; variances.len()];
    }
    let (mut low, mut high) = (low, high);
    for _ in 0..100 {
        let level = 0.5 * (low + high);
        match rates(level).iter().sum::<f64>() > bits {
            true => low = level,
            false => high = level,
        }
    }
    let mut found = rates(high);
    let left = bits - found.iter().sum::<f64>();
    let room: f64 = found.iter().map(|rate| most - rate).sum();
    if left > 1e-6 && room > 0.0 {
        found.iter_mut().for_each(|rate| *rate += left * (most - *rate) / room);
    }
    found
}

/// Whole bits of each column: their sums from the first column on are those of the rates, rounded.
fn whole_bits(rates: &[f64], bits: u32) -> Vec<u8> {
    let mut all = 0.0;
    let mut before = 0;
    let mut whole = Vec::with_capacity(rates.len());
    for (t, rate) in rates.iter().enumerate() {
        all += rate;
        let sum = if t + 1 == rates.len() { bits } else { (all.round() as u32).min(bits) };
        let here = (sum - before).min(u32::from(MOST_BITS));
        whole.push(here as u8);
        before += here;
    }
    whole
}

/// Mean of the squares of each column.
fn variances(data: Sample, ctx: &Context) -> Result<Vec<f64>> {
    let dim = data.dim();
    let parts = ctx.map(data.len().div_ceil(SUM_ROWS), |part| {
        let mut sums = vec![0f64; dim + 1];
        for row in part * SUM_ROWS..data.len().min((part + 1) * SUM_ROWS) {
            let weight = data.weight(row);
            let values = data.rows.row(row).iter().map(|v| f64::from(*v));
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * value * value);
            sums[dim] += weight;
        }
        Ok(sums)
    })?;
    let mut sums = vec![0f64; dim + 1];
    parts.iter().for_each(|part| sums.iter_mut().zip(part).for_each(|(sum, value)| *sum += value));
    let weight = sums.pop().unwrap_or(1.0);
    Ok(sums.into_iter().map(|sum| sum / weight).collect())
}

/// How large a row is against the columns' scales.
struct Size {
    /// What a value's square counts for.
    shares: Vec<f64>,
}

impl Size {
    /// Counts columns by the bits that they have.
    fn new(layout: &Layout, columns: &[f32]) -> Self {
        const NEAR: usize = 8;
        let bits = &layout.column_bits;
        let share = |t: usize| {
            let near = &bits[t.saturating_sub(NEAR)..(t + NEAR + 1).min(bits.len())];
            let rate = near.iter().map(|bits| f64::from(*bits)).sum::<f64>() / near.len() as f64;
            let spread = f64::from(columns[t]) / width(rate, layout.state_bits);
            if spread > 0.0 {
                (rate, rate / (spread * spread))
            } else {
                (0.0, 0.0)
            }
        };
        let shares: Vec<(f64, f64)> = (0..bits.len()).map(share).collect();
        let all: f64 = shares.iter().map(|(rate, _)| rate).sum();
        Size { shares: shares.iter().map(|(_, share)| if all > 0.0 { share / all } else { 0.0 }).collect() }
    }

    fn of(&self, row: &[f32]) -> f64 {
        row.iter().zip(&self.shares).map(|(v, share)| f64::from(*v) * f64::from(*v) * share).sum::<f64>().sqrt()
    }
}

/// Sizes of rows in rising order, with running sums of the weights and of the weighted sizes: what scales are fitted to.
struct Sizes {
    sizes: Vec<f64>,
    weights: Vec<f64>,
    moments: Vec<f64>,
    energy: f64,
}

impl Sizes {
    fn new(mut sizes: Vec<(f64, f64)>) -> Self {
        sizes.sort_by(|a, b| a.0.total_cmp(&b.0));
        if sizes.iter().all(|(_, weight)| *weight == 0.0) {
            sizes.iter_mut().for_each(|(_, weight)| *weight = 1.0);
        }
        let (mut weights, mut moments, mut energy) = (vec![0.0], vec![0.0], 0.0);
        for (at, (size, weight)) in sizes.iter().enumerate() {
            weights.push(weights[at] + weight);
            moments.push(moments[at] + weight * size);
            energy += weight * size * size;
        }
        Sizes { sizes: sizes.into_iter().map(|(size, _)| size).collect(), weights, moments, energy }
    }

    /// The mean of a range of rows, if they weigh anything.
    fn mean(&self, from: usize, to: usize) -> Option<f64> {
        let weight = self.weights[to] - self.weights[from];
        (weight > 0.0).then(|| (self.moments[to] - self.moments[from]) / weight)
    }

    /// `count` scales of small squared error, the first one zero if there are rows of nothing, and that error.
    fn scales(&self, count: usize) -> (Vec<f64>, f64) {
        const ROUNDS: usize = 50;
        let n = self.sizes.len();
        let zeros = self.sizes.partition_point(|size| *size == 0.0);
        let zero = usize::from(zeros > 0 && zeros < n && count > 1);
        let first = zero * zeros;
        let mut borders: Vec<usize> = (0..=count - zero).map(|i| first + (n - first) * i / (count - zero)).collect();
        let mut scales = vec![0.0; zero];
        for _ in 0..ROUNDS {
            scales.truncate(zero);
            for pair in borders.windows(2) {
                let last = scales.last().copied().unwrap_or(0.0);
                scales.push(self.mean(pair[0], pair[1]).unwrap_or(last));
            }
            for (border, pair) in borders[1..].iter_mut().zip(scales[zero..].windows(2)) {
                *border = self.sizes.partition_point(|size| *size < 0.5 * (pair[0] + pair[1])).max(first);
            }
        }
        // The squares of what each range has, less what its scale stands for.
        let kept = |(pair, scale): (&[usize], &f64)| {
            let weight = self.weights[pair[1]] - self.weights[pair[0]];
            let moment = self.moments[pair[1]] - self.moments[pair[0]];
            scale * (2.0 * moment - scale * weight)
        };
        let kept: f64 = borders.windows(2).zip(&scales[zero..]).map(kept).sum();
        let lost = if self.energy > 0.0 { (1.0 - kept / self.energy).max(0.0) } else { 0.0 };
        (scales, lost)
    }
}

impl TrellisQuantizer {
    fn row_bytes(&self, dim: usize) -> usize {
        // Less a little, so that a number of bits made from whole bytes gives these.
        ((self.n_bits * dim as f64 / 8.0 - 1e-9).ceil() as usize).clamp(1, dim)
    }

    /// Bits of the number of a row's scale, of `wanted` ones: a quarter of the row at most.
    fn scale_bits(&self, wanted: u32, bytes: usize) -> u32 {
        self.scale_bits.unwrap_or(wanted).min(2 * bytes.min(4) as u32)
    }

    /// The layout of rows of `bytes` bytes, and the bits of each column before they are whole.
    fn layout(&self, variances: &[f64], bytes: usize, scale_bits: u32) -> Result<(Layout, Vec<f64>)> {
        let dim = variances.len();
        let bits = 8 * bytes as u32 - scale_bits;
        let (rates, column_bits) = match self.bit_allocation {
            Allocation::Even => (vec![f64::from(bits) / dim as f64; dim], even_bits(dim, u64::from(bits))),
            Allocation::Variance => {
                let rates = water_filling(variances, f64::from(bits));
                let column_bits = whole_bits(&rates, bits);
                (rates, column_bits)
            }
        };
        // Windows that reach far around a short row would mostly see their own bits again. Measured.
        let most = column_bits.iter().copied().max().map_or(1, u32::from);
        let all = column_bits.iter().map(|bits| u32::from(*bits)).sum();
        let useful = (4 + bytes as u32).min(10).max(2 + 8 * bytes as u32 / 10);
        let state_bits = self.state_bits.min(useful).max(most).min(all);
        let layout = Layout::new(&column_bits, state_bits);
        if trellis::ways(&layout) > MOST_WAYS {
            return Err(Error::OutOfRange {
                what: format!("the search of rows of {dim} columns with {state_bits} state bits is too large"),
                why: "use fewer state bits".into(),
            });
        }
        Ok((layout, rates))
    }

    fn decoder(
        &self,
        layout: &Layout,
        bytes: usize,
        columns: &[f32],
        scale_bits: u32,
        scales: &[f64],
    ) -> Result<Decoder> {
        let count = 1usize << self.scale_bits(CHOSEN_SCALE_BITS, bytes);
        let mut stored: Vec<f32> = scales.iter().map(|scale| *scale as f32).collect();
        stored.resize(count, 0.0);
        let spec = TrellisSpec {
            dim: columns.len(),
            row_bytes: bytes,
            state_bits: layout.state_bits,
            scale_bits,
            scales: count,
            bits: match self.bit_allocation {
                Allocation::Even => String::new(),
                Allocation::Variance => layout.column_bits.iter().map(|bits| char::from(b'0' + bits)).collect(),
            },
        };
        Ok(Decoder::Trellis(Trellis::new(spec, columns, &stored)?))
    }

    fn fit_bytes(&self, data: Sample, bytes: usize, ctx: &Context) -> Result<Learned> {
        ctx.stage("scales", 0);
        let variances = variances(data, ctx)?;
        let first_bits = self.scale_bits(2, bytes);
        let (layout, rates) = self.layout(&variances, bytes, first_bits)?;
        let sizes = sizes(data, &layout, &columns(&variances, &rates, layout.state_bits), ctx)?;
        // A bit for scales is one less for values; scales that are wrong by a little cost more where there are many bits.
        let coded = rates.iter().zip(&variances).filter(|(rate, v)| **rate > 0.0 && **v > 0.0).count().max(1) as f64;
        let rate = rates.iter().sum::<f64>() / coded;
        let cost = |bits: u32, lost: f64| f64::from(bits) * SCALE_BIT / coded + SCALE_ERROR * rate * lost;
        let choices = match self.scale_bits {
            Some(_) => first_bits..=first_bits,
            None => 0..=self.scale_bits(CHOSEN_SCALE_BITS, bytes),
        };
        let mut best: Option<(f64, u32, Vec<f64>)> = None;
        for bits in choices {
            let (scales, lost) = sizes.scales(1 << bits);
            if best.as_ref().is_none_or(|(least, ..)| cost(bits, lost) < *least) {
                best = Some((cost(bits, lost), bits, scales));
            }
        }
        let (_, scale_bits, scales) = best.unwrap_or((0.0, 0, vec![1.0]));
        let (layout, rates) = self.layout(&variances, bytes, scale_bits)?;
        let columns = columns(&variances, &rates, layout.state_bits);
        let decoder = self.decoder(&layout, bytes, &columns, scale_bits, &scales)?;
        Ok(Learned { decoder, codes: None, n_iter: 1, notes: Vec::new() })
    }
}

/// Sizes of rows, some of them where there are many.
fn sizes(data: Sample, layout: &Layout, columns: &[f32], ctx: &Context) -> Result<Sizes> {
    let size = Size::new(layout, columns);
    let every = data.len().div_ceil(SCALED_ROWS);
    crate::error::room("the sizes of rows", &[product(&[data.len().div_ceil(every), 64])])?;
    let found = ctx.map(data.len().div_ceil(every).div_ceil(SUM_ROWS), |part| {
        let rows = (part * SUM_ROWS * every..data.len().min((part + 1) * SUM_ROWS * every)).step_by(every);
        Ok(rows.map(|row| (size.of(data.rows.row(row)), data.weight(row))).collect::<Vec<_>>())
    })?;
    Ok(Sizes::new(found.concat()))
}

/// Scales of the columns.
fn columns(variances: &[f64], rates: &[f64], state_bits: u32) -> Vec<f32> {
    variances.iter().zip(rates).map(|(variance, rate)| (variance.sqrt() * width(*rate, state_bits)) as f32).collect()
}

impl Quantizer for TrellisQuantizer {
    const NAME: &'static str = "trellis";
    const ABOUT: &'static str = "a row is a stream of bits, found as a whole, of which each column reads a window";
    const FRONT: Front = Front::rotated(Turning::Auto);

    fn check(&self) -> Result<()> {
        if !(self.n_bits > 0.0 && self.n_bits <= f64::from(MOST_BITS)) {
            return Err(Error::parameter("n_bits", self.n_bits, format!("must be above 0 and at most {MOST_BITS}")));
        }
        within("state_bits", self.state_bits as usize, 4, MOST_STATE_BITS as usize)?;
        within("scale_bits", self.scale_bits.unwrap_or(0) as usize, 0, MOST_SCALE_BITS as usize)
    }

    fn blank(&self, _: usize, dim: usize) -> Result<Decoder> {
        let bytes = self.row_bytes(dim);
        let scale_bits = self.scale_bits(0, bytes);
        let (layout, _) = self.layout(&vec![1.0; dim], bytes, scale_bits)?;
        self.decoder(&layout, bytes, &vec![0.0; dim], scale_bits, &[])
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        self.fit_bytes(data, self.row_bytes(data.dim()), ctx)
    }

    fn fit_components(&self, data: Sample, dim: usize, ctx: &Context) -> Result<Learned> {
        // Rows have the bytes that they would have with all components, as far as these components can use them.
        self.fit_bytes(data, self.row_bytes(dim).min(data.dim()), ctx)
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        let Decoder::Trellis(trellis) = decoder else {
            return Err(Error::shape("the decoder", decoder.form(), "the form trellis"));
        };
        Ok(Coder::new(trellis).encoder(ctx.clone()))
    }

    fn usual_rotation(&self) -> Option<Turning> {
        match self.bit_allocation {
            Allocation::Even => Some(Turning::Random),
            Allocation::Variance => Some(Turning::Pca),
        }
    }

    fn components(&self, variances: &[f64]) -> Vec<usize> {
        let dim = variances.len();
        let kept = match self.bit_allocation {
            Allocation::Even => dim,
            Allocation::Variance => {
                let rates = water_filling(variances, 8.0 * self.row_bytes(dim) as f64);
                rates.iter().take_while(|rate| **rate >= LEAST_RATE).count().max(1)
            }
        };
        (0..kept).collect()
    }
}

/// What the error of a row grows by where its scale is wrong by a part of it: the square of the part, times the row's
/// error, its bits a value and this. Measured.
const SCALE_ERROR: f64 = 1.2;

/// What the error of a row grows by, times its columns, where its values have a bit less: 2 ln 2.
const SCALE_BIT: f64 = 2.0 * std::f64::consts::LN_2;

/// A component that would have fewer bits is left out: its row of the rotation costs more.
const LEAST_RATE: f64 = 0.2;

/// Normalised values beyond this one are so far from all levels that it does not matter how far.
const FARTHEST: f64 = 1e4;

/// Encodes rows.
struct Coder<'a> {
    trellis: &'a Trellis,
    search: Search<'a>,
    size: Size,
    /// The largest scale of a column: rows are divided by it.
    unit: f64,
}

impl<'a> Coder<'a> {
    fn new(trellis: &'a Trellis) -> Self {
        let unit = trellis.columns().iter().fold(0f32, |unit, column| unit.max(column.abs()));
        let scales: Vec<f32> =
            trellis.columns().iter().map(|column| if unit > 0.0 { column / unit } else { 0.0 }).collect();
        let search = Search::new(trellis.layout(), trellis.levels(), &scales);
        let size = Size::new(trellis.layout(), trellis.columns());
        Coder { trellis, search, size, unit: f64::from(unit) }
    }

    /// The number of the scale nearest to a size.
    fn nearest(&self, size: f64) -> usize {
        let far = |number: &usize| (f64::from(self.trellis.scales()[*number]) - size).abs();
        (0..self.trellis.scales().len()).min_by(|a, b| far(a).total_cmp(&far(b))).unwrap_or(0)
    }

    fn encoder(self, ctx: Context) -> Encoder<'a> {
        Box::new(move |rows: Matrix, codes: &mut [u8]| {
            let mut room = self.search.room();
            let mut values = vec![0f32; rows.dim()];
            let bytes = codes.len() / rows.rows();
            for (row, code) in codes.chunks_mut(bytes).enumerate() {
                ctx.check()?;
                self.encode(rows.row(row), &mut values, &mut room, code);
            }
            Ok(())
        })
    }

    fn encode(&self, row: &[f32], values: &mut [f32], room: &mut trellis::Room, code: &mut [u8]) {
        code.fill(0);
        let number = self.nearest(self.size.of(row));
        let unit = f64::from(self.trellis.scales()[number]) * self.unit;
        if unit <= 0.0 {
            return self.write_scale(number, code);
        }
        for (value, v) in values.iter_mut().zip(row) {
            *value = (f64::from(*v) / unit).clamp(-FARTHEST, FARTHEST) as f32;
        }
        self.search.run(values, room);
        self.search.write(room, code);
        // Now that the levels are known, another scale may fit them better.
        let (mut both, mut square) = (0f64, 0f64);
        for ((level, column), v) in self.search.found(room).zip(self.trellis.columns()).zip(row) {
            let level = f64::from(level) * f64::from(*column);
            (both, square) = (both + level * f64::from(*v), square + level * level);
        }
        self.write_scale(if square > 0.0 { self.nearest(both / square) } else { number }, code);
    }

    fn write_scale(&self, number: usize, code: &mut [u8]) {
        let from = self.trellis.layout().bits as usize;
        for bit in 0..self.trellis.spec().scale_bits as usize {
            code[(from + bit) / 8] |= ((number >> bit & 1) as u8) << ((from + bit) % 8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_go_where_they_tell() {
        let variances = [64.0, 16.0, 4.0, 1.0, 0.25, 0.0];
        let rates = water_filling(&variances, 6.0);
        for (rate, expected) in rates.iter().zip([3.0, 2.0, 1.0, 0.0, 0.0, 0.0]) {
            assert!((rate - expected).abs() < 1e-6, "{rates:?}");
        }
        for bits in [1, 3, 8, 20, 40] {
            let whole = whole_bits(&water_filling(&variances, f64::from(bits)), bits);
            assert_eq!(whole.iter().map(|bits| u32::from(*bits)).sum::<u32>(), bits, "{whole:?}");
        }
        assert_eq!(whole_bits(&[0.5; 6], 3), [1, 0, 1, 0, 1, 0]);
        assert_eq!(whole_bits(&water_filling(&[0.0; 4], 8.0), 8), [2; 4]);
        assert_eq!(whole_bits(&water_filling(&[1.0, 0.0, 0.0], 24.0), 24), [8; 3]);
    }

    #[test]
    fn scales_are_means_of_their_rows() {
        let sizes = Sizes::new(vec![(3.0, 1.0), (0.0, 1.0), (1.0, 1.0), (3.2, 3.0), (1.2, 1.0)]);
        let (scales, lost) = sizes.scales(4);
        assert_eq!(scales.len(), 4);
        assert!(scales[0] == 0.0 && lost < 1e-3, "{scales:?} {lost}");
        let (scales, lost) = sizes.scales(1);
        assert!((scales[0] - 14.8 / 7.0).abs() < 1e-12, "{scales:?}");
        let expected = 1.0 - (14.8f64 / 7.0).powi(2) * 7.0 / (9.0 + 1.0 + 3.0 * 10.24 + 1.44);
        assert!((lost - expected).abs() < 1e-12);
        let (scales, lost) = Sizes::new(vec![(0.0, 1.0), (2.0, 1.0)]).scales(1);
        assert!(scales == [1.0] && (lost - 0.5).abs() < 1e-12, "{scales:?} {lost}");
    }
}
