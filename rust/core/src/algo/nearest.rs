//! The nearest of many centres, for many rows.
//!
//! score(x, c) = |c|^2 / 2 - <x, c> has the same minimum over c as the distance, and is one chain of fused
//! multiply-adds. Both sides are moved by the mean of the centres first, which keeps the two terms small. Distances are
//! then computed anew from differences, so that they do not suffer from cancellation. Each row's result depends on that
//! row and the centres alone: not on threads, instruction set or neighbours.

use crate::error::Result;
use crate::kernels::{self, Coarse, Kernels, Panels, Products, Sifting};
use crate::matrix::Matrix;
use crate::pool::Context;
use std::ops::Range;
use std::sync::OnceLock;

/// Some columns of row-major rows: product quantization clusters these without copying.
#[derive(Clone, Copy, Debug, Default)]
pub struct Columns<'a> {
    data: &'a [f32],
    rows: usize,
    stride: usize,
    width: usize,
}

impl<'a> From<Matrix<'a>> for Columns<'a> {
    fn from(matrix: Matrix<'a>) -> Self {
        Columns::new(matrix, 0, matrix.dim())
    }
}

impl<'a> Columns<'a> {
    /// Columns `start` to `start + width` of a matrix; at least one.
    pub fn new(matrix: Matrix<'a>, start: usize, width: usize) -> Self {
        assert!(width > 0 && start + width <= matrix.dim(), "columns {start}+{width} of {}", matrix.dim());
        // Without rows there is no first column to start from.
        let data = matrix.data().get(start..).unwrap_or_default();
        Columns { data, rows: matrix.rows(), stride: matrix.dim(), width }
    }

    /// Contiguous rows of `width` values.
    pub fn contiguous(data: &'a [f32], width: usize) -> Self {
        assert!(width > 0 && data.len().is_multiple_of(width), "{} values in rows of {width}", data.len());
        Columns { data, rows: data.len() / width, stride: width, width }
    }

    /// The first `width` columns of contiguous rows of `stride` values.
    pub fn leading(data: &'a [f32], stride: usize, width: usize) -> Self {
        Columns { width: width.min(stride), ..Columns::contiguous(data, stride) }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The first row's first value with all that follow, and the values from one row's start to the next.
    pub fn values(&self) -> (&'a [f32], usize) {
        (self.data, self.stride)
    }

    /// One row.
    #[inline]
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..self.width]
    }

    /// The rows of a range.
    pub fn block(&self, range: Range<usize>) -> Columns<'a> {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let data = self.data.get(range.start * self.stride..).unwrap_or_default();
        Columns { data, rows: range.len(), ..*self }
    }
}

/// Rows that are packed at a time, at most: a multiple of all vectors and tiles.
const PACKED_ROWS: usize = 192;

/// At least, and a divisor of the number.
const PACKED_STEP: usize = 48;

/// Values that are packed at a time, about: they stay in the second level cache while the centres pass by.
const PACKED_VALUES: usize = 1 << 17;

/// Distances of doubtful rows that are held at a time, about.
const SETTLED: usize = 1 << 18;

/// Doubtful rows that are settled at a time, at least: those that pass by the centres together.
const SETTLED_ROWS: usize = 12;

/// Multiply-adds between two looks at the context: some hundredths of a second.
const WORK: usize = 1 << 28;

/// Centres, packed for the kernels.
pub struct Centroids {
    kernels: &'static Kernels,
    width: usize,
    count: usize,
    centers: Vec<f32>,
    /// The mean of the centres, taken from both sides.
    shift: Vec<f32>,
    /// `[block][column][centre]`, moved.
    blocks: Vec<f32>,
    half_norms: Vec<f32>,
    /// 0, 1, ... up to the last centre of the last block.
    labels: Vec<u32>,
    /// The largest norm of a moved centre.
    reach: f64,
    /// `[panel][column][centre]`, not moved; packed on first use.
    panels: OnceLock<Vec<f32>>,
    /// Made on first use, where that pays.
    rounded: OnceLock<Option<Rounded>>,
}

impl std::fmt::Debug for Centroids {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Centroids({} of {} columns, {})", self.count, self.width, self.kernels.name)
    }
}

impl Centroids {
    /// Packs centres of `width` values each; at least one.
    pub fn new(centers: &[f32], width: usize) -> Self {
        Centroids::with_kernels(kernels::best(), centers, width)
    }

    fn with_kernels(kernels: &'static Kernels, centers: &[f32], width: usize) -> Self {
        assert!(width > 0 && !centers.is_empty() && centers.len().is_multiple_of(width), "whole centres");
        let count = centers.len() / width;
        let shift = mean(centers, width);
        let moved: Vec<f32> =
            centers.chunks_exact(width).flat_map(|c| c.iter().zip(&shift).map(|(c, s)| c - s)).collect();
        let norms: Vec<f64> =
            moved.chunks_exact(width).map(|c| c.iter().map(|v| f64::from(*v).powi(2)).sum()).collect();
        let mut half_norms: Vec<f32> = norms.iter().map(|norm| (norm / 2.0) as f32).collect();
        half_norms.resize(count.next_multiple_of(kernels.block_centers), f32::INFINITY);
        Centroids {
            kernels,
            width,
            count,
            centers: centers.to_vec(),
            blocks: interleave(&moved, width, kernels.block_centers),
            shift,
            labels: (0..half_norms.len() as u32).collect(),
            half_norms,
            reach: norms.iter().fold(0.0, |a: f64, b| a.max(*b)).sqrt(),
            panels: OnceLock::new(),
            rounded: OnceLock::new(),
        }
    }

    /// Number of centres.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Never true: there is at least one centre.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Values in a centre.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The centre nearest to each row, in float32; the first of equals. `distances`: squared, never negative.
    pub fn nearest(&self, x: Columns, labels: &mut [u32], distances: Option<&mut [f32]>, ctx: &Context) -> Result<()> {
        self.in_blocks(x, labels, distances, ctx, Self::nearest_block)
    }

    /// The centre nearest to each row as float64 sees it; the first of equals. Rows whose two lowest scores are further
    /// apart than float32 can err are settled by these.
    pub fn nearest_exact(
        &self,
        x: Columns,
        labels: &mut [u32],
        distances: Option<&mut [f32]>,
        ctx: &Context,
    ) -> Result<()> {
        self.in_blocks(x, labels, distances, ctx, Self::exact_block)
    }

    /// Runs `work` over blocks of rows whose size does not depend on the threads.
    fn in_blocks(
        &self,
        x: Columns,
        labels: &mut [u32],
        distances: Option<&mut [f32]>,
        ctx: &Context,
        work: impl Fn(&Self, Columns, &mut [u32], Option<&mut [f32]>) + Sync,
    ) -> Result<()> {
        self.check(x, labels.len(), distances.as_deref());
        let size = (WORK / (self.count * self.width)).clamp(PACKED_ROWS, 2048) / PACKED_ROWS * PACKED_ROWS;
        ctx.chunks(labels, size, |block, labels| {
            let first = block * size;
            work(self, x.block(first..first + labels.len()), labels, None);
            Ok(())
        })?;
        let Some(distances) = distances else { return Ok(()) };
        ctx.chunks(distances, size, |block, distances| {
            let range = block * size..block * size + distances.len();
            self.distances_to(x.block(range.clone()), &labels[range], distances);
            Ok(())
        })
    }

    /// [`Centroids::nearest`] on the calling thread, for use inside a block that already runs in parallel.
    pub fn nearest_block(&self, x: Columns, labels: &mut [u32], distances: Option<&mut [f32]>) {
        self.check(x, labels.len(), distances.as_deref());
        let mut scratch = Scratch::new(self.width, false);
        for first in (0..x.rows()).step_by(scratch.rows) {
            let last = x.rows().min(first + scratch.rows);
            scratch.run(self, x.block(first..last));
            labels[first..last].copy_from_slice(&scratch.labels[..last - first]);
        }
        if let Some(distances) = distances {
            self.distances_to(x, labels, distances);
        }
    }

    /// [`Centroids::nearest_exact`] on the calling thread.
    pub fn exact_block(&self, x: Columns, labels: &mut [u32], distances: Option<&mut [f32]>) {
        self.check(x, labels.len(), distances.as_deref());
        let mut scratch = Scratch::new(self.width, true);
        let mut doubtful = Vec::new();
        for first in (0..x.rows()).step_by(scratch.rows) {
            let last = x.rows().min(first + scratch.rows);
            scratch.run(self, x.block(first..last));
            // Most rows need no bound of their own.
            let most = 2.0 * self.error_at(scratch.largest_norm(self, last - first));
            for row in first..last {
                let (label, best, second) = scratch.result(row - first);
                let gap = f64::from(second) - f64::from(best);
                labels[row] = label;
                if !(gap > most || gap > 2.0 * self.error_bound(x.row(row))) {
                    doubtful.push(row);
                }
            }
        }
        self.settle(x, &doubtful, labels);
        if let Some(distances) = distances {
            self.distances_to(x, labels, distances);
        }
    }

    /// The centre of the lowest score |c|^2 / 2 - <x, c> for each row, the first of equals, as [`Centroids::nearest`] has
    /// it, with that score and the next lowest, on the calling thread. Rows and centres are moved by the same vector
    /// first: twice a score is the squared distance less [`Centroids::moved_norm`], up to twice
    /// [`Centroids::error_bound`]. With one centre the next lowest score is infinite.
    pub fn scores_block(&self, x: Columns, labels: &mut [u32], lowest: &mut [f32], second: &mut [f32]) {
        self.check(x, labels.len(), Some(lowest));
        self.check(x, labels.len(), Some(second));
        // Second scores are wanted whatever they are.
        let mut scratch = Scratch { sift: false, ..Scratch::new(self.width, true) };
        for first in (0..x.rows()).step_by(scratch.rows) {
            let last = x.rows().min(first + scratch.rows);
            scratch.run(self, x.block(first..last));
            labels[first..last].copy_from_slice(&scratch.labels[..last - first]);
            lowest[first..last].copy_from_slice(&scratch.best[..last - first]);
            second[first..last].copy_from_slice(&scratch.second[..last - first]);
        }
    }

    /// The squared norm of a row that is moved as the scores have it.
    pub fn moved_norm(&self, row: &[f32]) -> f64 {
        squared_distance(row, &self.shift)
    }

    /// The largest norm of a moved centre.
    pub fn reach(&self) -> f64 {
        self.reach
    }

    /// How far a score in float32 can be from half the squared distance less half the squared norm of the row.
    ///
    /// With u = 2^-24: moving the row and the centre rounds each value once, which changes half the squared distance by
    /// at most u |x - c| (|x| + |c|) <= u (|x| + |c|)^2; the half norm is rounded once; and each step of the chain of
    /// `width` steps rounds a partial sum that is at most |c|^2 / 2 + |x| |c|. Errors before make a partial sum larger by
    /// `width` u of that, |x| is known to (`width` + 4) u / 2 of itself, and all else is of order u: 4 (`width` + 4) u
    /// more covers them. The smallest normal number a step covers values that are too small to be squared.
    pub fn error_bound(&self, row: &[f32]) -> f64 {
        self.error_at(f64::from(near_distance(row, &self.shift)).sqrt())
    }

    /// [`Centroids::error_bound`] of any row whose norm, when moved, is at most this.
    pub fn error_at(&self, norm: f64) -> f64 {
        let unit = f64::from(f32::EPSILON) / 2.0;
        let steps = (self.width + 1) as f64 * (self.reach * self.reach / 2.0 + norm * self.reach);
        let above = 1.0 + 4.0 * (self.width + 4) as f64 * unit;
        unit * above * (steps + (norm + self.reach).powi(2)) + f64::from(f32::MIN_POSITIVE) * self.width as f64
    }

    /// The nearest centres of some rows in float64, among those whose distance in float32 is within its error of the
    /// lowest.
    ///
    /// With u = 2^-24: the difference, the square and each of at most `width` additions of terms that are not negative
    /// are rounded to u of themselves, so that the sum has an error of (1 + u)^(width + 2) - 1 of itself. Three times
    /// that covers the errors of both distances and terms of order u^2; the smallest numbers lose more, but no more than
    /// the smallest normal one a term.
    fn settle(&self, x: Columns, rows: &[usize], labels: &mut [u32]) {
        let factor = 1.0 + 1.5 * f64::from(f32::EPSILON) * (self.width + 3) as f64;
        let tiny = f64::from(f32::MIN_POSITIVE) * self.width as f64;
        let (mut values, mut distances) = (Vec::new(), Vec::new());
        for rows in rows.chunks((SETTLED / self.count).clamp(SETTLED_ROWS, PACKED_ROWS)) {
            values.clear();
            rows.iter().for_each(|row| values.extend_from_slice(x.row(*row)));
            distances.resize(rows.len() * self.count, 0.0);
            self.distances_block(Columns::contiguous(&values, self.width), &mut distances);
            for (row, distances) in rows.iter().zip(distances.chunks_exact(self.count)) {
                // Infinite where it is too large for single precision: all centres are compared then.
                let limit = (f64::from(lowest(distances)) * factor + tiny) as f32;
                let mut low = f64::INFINITY;
                for (j, near) in distances.iter().enumerate() {
                    if *near <= limit {
                        let center = &self.centers[j * self.width..][..self.width];
                        let distance = bounded_distance(x.row(*row), center, low);
                        if distance < low {
                            (labels[*row], low) = (j as u32, distance);
                        }
                    }
                }
            }
        }
    }

    /// The squared distance of each row to the centre of its label.
    pub fn distances_to(&self, x: Columns, labels: &[u32], distances: &mut [f32]) {
        for (row, (label, distance)) in labels.iter().zip(distances).enumerate() {
            let center = &self.centers[*label as usize * self.width..][..self.width];
            *distance = near_distance(x.row(row), center);
        }
    }

    /// All scalar products, `out[row * len + centre]`, on the calling thread.
    pub fn dots_block(&self, x: Columns, out: &mut [f32]) {
        (self.kernels.dots)(&self.products(x), out);
    }

    /// All squared distances, summed from differences, `out[row * len + centre]`, on the calling thread.
    pub fn distances_block(&self, x: Columns, out: &mut [f32]) {
        (self.kernels.distances)(&self.products(x), out);
    }

    fn products<'a>(&'a self, x: Columns<'a>) -> Products<'a> {
        assert_eq!(x.width, self.width, "columns of the rows and of the centres");
        let panels = self.panels.get_or_init(|| interleave(&self.centers, self.width, self.kernels.panel_centers));
        Products { width: self.width, x: x.data, stride: x.stride, rows: x.rows, centers: panels, count: self.count }
    }

    /// The centres for [`Kernels::sift`], unless there are too few values for it to pay, or they are too large.
    fn rounded(&self) -> Option<&Rounded> {
        let make = || {
            let (block, pairs) = (self.kernels.block_centers, self.width.div_ceil(2));
            let mut words = vec![0; self.half_norms.len() * pairs];
            let mut most: f64 = 0.0;
            for (j, center) in self.centers.chunks_exact(self.width).enumerate() {
                let words = &mut words[j / block * pairs * block + j % block..];
                let mut lost = 0.0;
                for (t, (value, shift)) in center.iter().zip(&self.shift).enumerate() {
                    let value = value - shift;
                    let normal = if value.is_normal() { half::bf16::from_f32(value) } else { half::bf16::ZERO };
                    lost += (f64::from(value) - normal.to_f64()).powi(2);
                    words[t / 2 * block] |= u32::from(normal.to_bits()) << (t % 2 * 16);
                }
                most = most.max(lost);
            }
            // A little more, because float64 and float32 round too.
            let above = |value: f64| (value * (1.0 + 1e-6)) as f32;
            Rounded { pairs: words, reach: above(self.reach), error: above(most.sqrt()) }
        };
        let pays = self.kernels.sift.is_some() && self.count * self.width >= SIFTED && self.reach < 1e15;
        self.rounded.get_or_init(|| pays.then(make)).as_ref()
    }

    fn check(&self, x: Columns, labels: usize, distances: Option<&[f32]>) {
        assert_eq!(x.width, self.width, "columns of the rows and of the centres");
        assert!(labels == x.rows && distances.is_none_or(|d| d.len() == labels), "one label and distance a row");
    }
}

/// Centres in bfloat16: see [`Coarse`].
struct Rounded {
    pairs: Vec<u32>,
    reach: f32,
    error: f32,
}

/// Values of centres from which a first pass in bfloat16 pays.
const SIFTED: usize = 100_000;

/// Room for passes of the nearest kernel.
struct Scratch {
    /// Rows of a pass.
    rows: usize,
    panels: Vec<f32>,
    labels: Vec<u32>,
    best: Vec<f32>,
    second: Vec<f32>,
    /// Whether a first pass in bfloat16 may be tried, and its room.
    sift: bool,
    sifting: Sifting,
}

impl Scratch {
    /// For rows of `width` values; second scores if `second`.
    fn new(width: usize, second: bool) -> Self {
        let rows = (PACKED_VALUES / width).clamp(PACKED_STEP, PACKED_ROWS) / PACKED_STEP * PACKED_STEP;
        Scratch {
            rows,
            panels: vec![0.0; rows * width],
            labels: vec![0; rows],
            best: vec![0.0; rows],
            second: vec![0.0; if second { rows } else { 0 }],
            sift: true,
            sifting: Sifting::default(),
        }
    }

    /// Packs up to `self.rows` rows less `shift`.
    fn pack(&mut self, kernels: &Kernels, x: Columns, shift: &[f32]) {
        let padded = x.rows.next_multiple_of(kernels.panel_rows);
        (kernels.pack)(x.data, x.stride, x.rows, shift, &mut self.panels[..padded * shift.len()]);
    }

    /// Labels and scores of the rows of `x`, which were packed with `width` columns, of which those from `start` on are
    /// compared. `part` of `parts` of the rows that follow are fetched meanwhile.
    fn compare(&mut self, centroids: &Centroids, x: Columns, width: usize, start: usize, part: usize, parts: usize) {
        let kernels = centroids.kernels;
        let padded = x.rows.next_multiple_of(kernels.panel_rows);
        let following = |part: usize| x.rows * x.stride * part / parts;
        let panels = Panels {
            width: centroids.width,
            rows: &self.panels[start * kernels.panel_rows..padded * width],
            stride: width * kernels.panel_rows,
            centers: &centroids.blocks,
            half_norms: &centroids.half_norms,
            labels: &centroids.labels,
            next: x.data.as_ptr().wrapping_add(x.rows * x.stride + following(part)),
            next_values: following(part + 1) - following(part),
        };
        let second = if self.second.is_empty() { 0 } else { padded };
        let (labels, best) = (&mut self.labels[..padded], &mut self.best[..padded]);
        let second = &mut self.second[..second];
        if let (true, Some(sift), Some(rounded)) = (self.sift, kernels.sift, centroids.rounded()) {
            let coarse = Coarse { pairs: &rounded.pairs, reach: rounded.reach, error: rounded.error };
            self.sift = sift(&panels, &coarse, &mut self.sifting, labels, best, second);
            if self.sift {
                return;
            }
        }
        (kernels.nearest)(&panels, labels, best, second);
    }

    /// Labels and scores of up to `self.rows` rows.
    fn run(&mut self, centroids: &Centroids, x: Columns) {
        self.pack(centroids.kernels, x, &centroids.shift);
        self.compare(centroids, x, centroids.width, 0, 0, 1);
    }

    /// The largest norm of the packed rows.
    fn largest_norm(&self, centroids: &Centroids, rows: usize) -> f64 {
        let lanes = centroids.kernels.panel_rows;
        assert!(16 % lanes == 0, "panels of {lanes} rows");
        let mut largest = 0.0f32;
        for panel in self.panels.chunks_exact(lanes * centroids.width).take(rows.div_ceil(lanes)) {
            // Sixteen running sums, so that the compiler can use vectors: some for each row.
            let mut sums = [0.0f32; 16];
            let mut chunks = panel.chunks_exact(16);
            for values in &mut chunks {
                for i in 0..16 {
                    sums[i] += values[i] * values[i];
                }
            }
            sums.iter_mut().zip(chunks.remainder()).for_each(|(sum, value)| *sum += value * value);
            for row in 0..lanes {
                largest = largest.max(sums[row..].iter().step_by(lanes).sum());
            }
        }
        f64::from(largest).sqrt()
    }

    fn result(&self, row: usize) -> (u32, f32, f32) {
        (self.labels[row], self.best[row], self.second[row])
    }
}

/// Several sets of centres, each for columns of its own, as in product quantization: rows are packed once for all.
pub struct Parts {
    /// First column and centres.
    parts: Vec<(usize, Centroids)>,
    /// What is taken from each column.
    shift: Vec<f32>,
}

impl Parts {
    /// Centres for the columns from `start` on, for rows of `width` values; at least one set. No column is in two sets.
    pub fn new(parts: Vec<(usize, Centroids)>, width: usize) -> Self {
        let mut shift = vec![0.0; width];
        for (start, centroids) in &parts {
            shift[*start..][..centroids.width].copy_from_slice(&centroids.shift);
        }
        Parts { parts, shift }
    }

    /// Each part's nearest centre for each row, as [`Centroids::nearest_block`] has it: `labels[part * rows + row]`.
    pub fn nearest_block(&self, x: Columns, labels: &mut [u32]) {
        let width = self.shift.len();
        assert!(x.width == width && labels.len() == self.parts.len() * x.rows, "a label for each row and part");
        let mut scratch = Scratch::new(width, false);
        for first in (0..x.rows).step_by(scratch.rows) {
            let last = x.rows.min(first + scratch.rows);
            let rows = x.block(first..last);
            scratch.pack(self.parts[0].1.kernels, rows, &self.shift);
            for (part, (start, centroids)) in self.parts.iter().enumerate() {
                scratch.compare(centroids, rows, width, *start, part, self.parts.len());
                labels[part * x.rows..][first..last].copy_from_slice(&scratch.labels[..last - first]);
            }
        }
    }
}

fn mean(rows: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0f64; width];
    for row in rows.chunks_exact(width) {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += f64::from(*value);
        }
    }
    let count = (rows.len() / width) as f64;
    sums.iter().map(|sum| (sum / count) as f32).collect()
}

/// `[group][column][row of the group]`, the last group filled up with zeros.
pub(super) fn interleave(rows: &[f32], width: usize, group: usize) -> Vec<f32> {
    let count = rows.len() / width;
    let mut out = vec![0.0; count.next_multiple_of(group) * width];
    for (j, row) in rows.chunks_exact(width).enumerate() {
        let out = &mut out[j / group * group * width + j % group..];
        for (t, value) in row.iter().enumerate() {
            out[t * group] = *value;
        }
    }
    out
}

/// The squared distance in float64.
pub fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    bounded_distance(a, b, f64::INFINITY)
}

/// [`squared_distance`], or something above `limit` as soon as that is certain.
fn bounded_distance(a: &[f32], b: &[f32], limit: f64) -> f64 {
    let square = |a: &f32, b: &f32| (f64::from(*a) - f64::from(*b)) * (f64::from(*a) - f64::from(*b));
    let mut total = 0.0;
    for (a, b) in a.chunks(64).zip(b.chunks(64)) {
        // Several running sums, so that the compiler can use vectors.
        let mut sums = [0.0f64; 8];
        let (mut a, mut b) = (a.chunks_exact(8), b.chunks_exact(8));
        for (a, b) in (&mut a).zip(&mut b) {
            for t in 0..8 {
                sums[t] += square(&a[t], &b[t]);
            }
        }
        let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| square(a, b)).sum();
        total += sums.iter().sum::<f64>() + rest;
        if total > limit {
            break;
        }
    }
    total
}

/// The squared distance in float32: eight running sums, so that the compiler can use vectors.
fn near_distance(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (mut a, mut b) = (a.chunks_exact(8), b.chunks_exact(8));
    for (a, b) in (&mut a).zip(&mut b) {
        for t in 0..8 {
            sums[t] += (a[t] - b[t]) * (a[t] - b[t]);
        }
    }
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| (a - b) * (a - b)).sum();
    sums.iter().sum::<f32>() + rest
}

/// The lowest of some values: sixteen running minima, so that the compiler can use vectors.
fn lowest(values: &[f32]) -> f32 {
    let lower = |a: f32, b: f32| if b < a { b } else { a };
    let mut lows = [f32::INFINITY; 16];
    let mut chunks = values.chunks_exact(16);
    for values in &mut chunks {
        for i in 0..16 {
            lows[i] = lower(lows[i], values[i]);
        }
    }
    lows.iter().chain(chunks.remainder()).fold(f32::INFINITY, |a, b| lower(a, *b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn normal(rng: &mut Rng, count: usize) -> Vec<f32> {
        (0..count).map(|_| rng.normal() as f32).collect()
    }

    fn brute(x: Columns, centers: &[f32]) -> Vec<u32> {
        let of_row = |row: usize| {
            let mut best = (f64::INFINITY, 0);
            for (j, center) in centers.chunks_exact(x.width()).enumerate() {
                let distance: f64 =
                    x.row(row).iter().zip(center).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
                if distance < best.0 {
                    best = (distance, j as u32);
                }
            }
            best.1
        };
        (0..x.rows()).map(of_row).collect()
    }

    #[test]
    fn exact_labels_are_those_of_a_plain_search_in_double() {
        let ctx = Context::new(Some(2), 0);
        for (seed, (rows, width, count)) in
            [(300, 1, 5), (500, 2, 256), (1000, 7, 33), (3000, 16, 64), (400, 70, 300), (1, 3, 1)]
                .into_iter()
                .enumerate()
        {
            let rng = &mut Rng::new(seed as u64);
            let mut x = normal(rng, rows * (width + 2));
            let mut centers = normal(rng, count * width);
            for step in 0..4 {
                // Then with an offset that costs most digits, rounded to few values, and with repeated centres.
                match step {
                    1 => x.iter_mut().chain(&mut centers).for_each(|v| *v += 1000.0),
                    2 => x.iter_mut().chain(&mut centers).for_each(|v| *v = (*v * 2.0).round() / 2.0),
                    3 => centers.copy_within(0..count / 2 * width, count / 2 * width),
                    _ => {}
                }
                let columns = Columns::new(Matrix::new(&x, width + 2).unwrap(), 1, width);
                let (mut labels, mut distances) = (vec![0; rows], vec![0.0; rows]);
                let centroids = Centroids::new(&centers, width);
                centroids.nearest_exact(columns, &mut labels, Some(&mut distances), &ctx).unwrap();
                assert_eq!(labels, brute(columns, &centers), "step {step} {rows} {width} {count}");
                for row in 0..rows {
                    let center = &centers[labels[row] as usize * width..][..width];
                    let expected = squared_distance(columns.row(row), center);
                    assert!((f64::from(distances[row]) - expected).abs() <= 1e-5 * expected, "{expected}");
                }
            }
        }
    }

    #[test]
    fn results_depend_on_the_row_alone() {
        let _fence = kernels::fence::Fence::new();
        let rng = &mut Rng::new(5);
        for width in [1, 2, 4, 5, 8, 19] {
            let (rows, count) = (5000, 50);
            let (x, centers) = (normal(rng, rows * width), normal(rng, count * width));
            let x = Columns::contiguous(&x, width);
            let expected = {
                let mut labels = vec![0; rows];
                Centroids::with_kernels(kernels::available()[0], &centers, width).nearest_block(x, &mut labels, None);
                labels
            };
            for table in kernels::available() {
                let centroids = Centroids::with_kernels(table, &centers, width);
                for threads in 1..=3 {
                    let mut labels = vec![0; rows];
                    centroids.nearest(x, &mut labels, None, &Context::new(Some(threads), 0)).unwrap();
                    assert_eq!(labels, expected, "{} {threads} threads", table.name);
                }
                for row in [0, 17, rows - 1] {
                    let mut label = [0];
                    centroids.nearest_block(x.block(row..row + 1), &mut label, None);
                    assert_eq!(label[0], expected[row]);
                }
            }
        }
    }

    #[test]
    fn a_first_pass_in_bfloat16_changes_nothing() {
        let _fence = kernels::fence::Fence::new();
        // Enough centres for it; normal values, few values full of ties, repeated centres, a far offset, all sizes.
        let (rows, width, count) = (150, 129, 800);
        for (step, size) in [1.0f32, 1.0, 1.0, 1.0, 1e-38, 1e-22, 1e14, 1e18].into_iter().enumerate() {
            let rng = &mut Rng::new(step as u64);
            let (mut x, mut centers) = (normal(rng, rows * width), normal(rng, count * width));
            match step {
                1 => x.iter_mut().chain(&mut centers).for_each(|v| *v = v.round()),
                2 => centers.copy_within(0..count / 2 * width, count / 2 * width),
                3 => x.iter_mut().chain(&mut centers).for_each(|v| *v += 3000.0),
                _ => x.iter_mut().chain(&mut centers).for_each(|v| *v *= size),
            }
            let x = Columns::contiguous(&x, width);
            let mut expected: Option<[Vec<u32>; 2]> = None;
            for table in kernels::available() {
                let centroids = Centroids::with_kernels(table, &centers, width);
                let mut got = [vec![0; rows], vec![0; rows]];
                centroids.nearest_block(x, &mut got[0], None);
                centroids.exact_block(x, &mut got[1], None);
                assert_eq!(*expected.get_or_insert_with(|| got.clone()), got, "step {step} {}", table.name);
            }
        }
    }

    #[test]
    fn near_ties_are_decided_as_in_double() {
        let _fence = kernels::fence::Fence::new();
        // Few and enough values for a first pass in bfloat16. Rows lie between two centres, up to rounding, and some of
        // these are repeated; then all is far from the origin; then centres are close together, seen from the rows.
        for (seed, (width, count)) in [(5, 40), (64, 800), (129, 800), (384, 300)].into_iter().enumerate() {
            let rng = &mut Rng::new(seed as u64);
            let rows = 120;
            let mut centers = normal(rng, count * width);
            centers.copy_within(0..count / 4 * width, count / 2 * width);
            let mut x = Vec::new();
            for row in 0..rows {
                let (a, b) = (rng.below(count) * width, rng.below(count) * width);
                let part = if row % 3 == 0 { 0.45 } else { 0.5 };
                x.extend((0..width).map(|t| centers[a + t] * part + centers[b + t] * (1.0 - part)));
            }
            for step in 0..3 {
                match step {
                    1 => x.iter_mut().chain(&mut centers).for_each(|v| *v += 100.0),
                    2 => centers.iter_mut().for_each(|v| *v = 100.0 + (*v - 100.0) / 1024.0),
                    _ => {}
                }
                let x = Columns::contiguous(&x, width);
                let expected = brute(x, &centers);
                for table in kernels::available() {
                    let mut labels = vec![0; rows];
                    Centroids::with_kernels(table, &centers, width).exact_block(x, &mut labels, None);
                    assert_eq!(labels, expected, "{width} {count} step {step} {}", table.name);
                }
            }
        }
    }

    #[test]
    fn scores_are_within_their_bound() {
        let _fence = kernels::fence::Fence::new();
        let rng = &mut Rng::new(8);
        for (rows, width, count) in [(200, 2, 256), (130, 17, 40), (64, 40, 2)] {
            let (x, centers) = (normal(rng, rows * width), normal(rng, count * width));
            let (x, centroids) = (Columns::contiguous(&x, width), Centroids::new(&centers, width));
            let (mut labels, mut expected) = (vec![0; rows], vec![0; rows]);
            let (mut lowest, mut second) = (vec![0.0; rows], vec![0.0; rows]);
            centroids.scores_block(x, &mut labels, &mut lowest, &mut second);
            centroids.nearest_block(x, &mut expected, None);
            assert_eq!(labels, expected);
            for row in 0..rows {
                let mut distances: Vec<f64> =
                    centers.chunks_exact(width).map(|center| squared_distance(x.row(row), center)).collect();
                distances.sort_by(f64::total_cmp);
                for (score, distance) in [lowest[row], second[row]].into_iter().zip(distances) {
                    let error = (f64::from(score) * 2.0 + centroids.moved_norm(x.row(row)) - distance).abs();
                    assert!(error <= 2.0 * centroids.error_bound(x.row(row)), "{error}");
                }
            }
        }
    }

    #[test]
    fn products_are_those_of_the_formulas() {
        let rng = &mut Rng::new(6);
        let (rows, width, count) = (21, 10, 37);
        let (x, centers) = (normal(rng, rows * width), normal(rng, count * width));
        let (x, centroids) = (Columns::contiguous(&x, width), Centroids::new(&centers, width));
        let (mut dots, mut distances) = (vec![0.0; rows * count], vec![0.0; rows * count]);
        centroids.dots_block(x, &mut dots);
        centroids.distances_block(x, &mut distances);
        for (i, (dot, distance)) in dots.iter().zip(&distances).enumerate() {
            let center = &centers[i % count * width..][..width];
            let expected: f64 = x.row(i / count).iter().zip(center).map(|(a, b)| f64::from(a * b)).sum();
            assert!((f64::from(*dot) - expected).abs() < 1e-5);
            assert!((f64::from(*distance) - squared_distance(x.row(i / count), center)).abs() < 1e-4);
        }
    }

    #[test]
    fn no_rows() {
        let centroids = Centroids::new(&[1.0, 2.0], 2);
        let x = Columns::new(Matrix::new(&[], 3).unwrap(), 1, 2);
        centroids.nearest(x, &mut [], None, &Context::default()).unwrap();
        centroids.dots_block(x, &mut []);
        assert_eq!((centroids.len(), centroids.width(), centroids.is_empty()), (1, 2, false));
    }

    #[test]
    fn cancellation_by_the_caller_stops() {
        let ctx = Context::new(Some(1), 0);
        ctx.cancel();
        let (x, centroids) = ([0.0; 4], Centroids::new(&[1.0, 2.0], 2));
        assert!(centroids.nearest(Columns::contiguous(&x, 2), &mut [0; 2], None, &ctx).is_err());
    }
}
