//! The nearest of many centres: distances and the choice among them fused, for panels of rows.

use super::{check, Panels, Simd};
use std::ops::Range;

/// Rows against all centres. Up to 4 columns stay in registers for `V4` vectors of rows, up to 8 for `V8`; more are taken
/// in tiles of `NV` vectors of rows and `NC` centres, which is also the block in which centres are packed.
#[inline(always)]
pub(in crate::kernels) unsafe fn nearest<
    S: Simd,
    const NV: usize,
    const NC: usize,
    const V4: usize,
    const V8: usize,
>(
    panels: &Panels,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    check::nearest(panels, labels, best, second, S::LANES, NC);
    labels.fill(0);
    best.fill(f32::INFINITY);
    second.fill(f32::INFINITY);
    // SAFETY: everything was checked; the instruction set is the caller's.
    unsafe {
        match panels.width {
            1 => narrow::<S, NC, 1, V4, V4>(panels, labels, best, second),
            2 => narrow::<S, NC, 2, V4, V4>(panels, labels, best, second),
            3 => narrow::<S, NC, 3, V4, V4>(panels, labels, best, second),
            4 => narrow::<S, NC, 4, V4, V8>(panels, labels, best, second),
            5 => narrow::<S, NC, 5, V8, V8>(panels, labels, best, second),
            6 => narrow::<S, NC, 6, V8, V8>(panels, labels, best, second),
            7 => narrow::<S, NC, 7, V8, V8>(panels, labels, best, second),
            8 => narrow::<S, NC, 8, V8, V8>(panels, labels, best, second),
            _ if second.is_empty() => wide::<S, NV, NC, false>(panels, labels, best, second),
            _ => wide::<S, NV, NC, true>(panels, labels, best, second),
        }
    }
}

/// Memory that is fetched a few lines at a time while other work goes on: all at once, the fetches would wait for each
/// other, and the work for them.
pub(in crate::kernels) struct Ahead {
    next: *const f32,
    lines: usize,
    /// Lines at each call.
    share: usize,
}

impl Ahead {
    /// Spreads the fetches over `calls` calls.
    pub(in crate::kernels) fn new(panels: &Panels, calls: usize) -> Self {
        let lines = panels.next_values.div_ceil(LINE);
        Ahead { next: panels.next, lines, share: lines.div_ceil(calls.max(1)) }
    }

    #[inline(always)]
    pub(in crate::kernels) fn fetch(&mut self) {
        let share = self.share.min(self.lines);
        for _ in 0..share {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a prefetch does not fault, whatever the address.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(self.next.cast());
            }
            self.next = self.next.wrapping_add(LINE);
        }
        self.lines -= share;
    }
}

/// Values in a cache line.
const LINE: usize = 16;

/// The lowest scores of a vector of rows so far, and whose they are. Labels travel as bit patterns of `f32`, which
/// selections do not change.
#[derive(Clone, Copy)]
struct Lowest<S> {
    best: S,
    second: S,
    label: S,
}

impl<S: Simd> Lowest<S> {
    /// Reads the entries from `at`; `second` only if `SECOND`.
    #[inline(always)]
    unsafe fn load<const SECOND: bool>(labels: &[u32], best: &[f32], second: &[f32], at: usize) -> Self {
        // SAFETY: the caller's slices have a vector from `at`.
        unsafe {
            let best = S::load(best.as_ptr().add(at));
            let second = if SECOND { S::load(second.as_ptr().add(at)) } else { best };
            Lowest { best, second, label: S::load(labels.as_ptr().add(at).cast()) }
        }
    }

    #[inline(always)]
    unsafe fn store<const SECOND: bool>(self, labels: &mut [u32], best: &mut [f32], second: &mut [f32], at: usize) {
        // SAFETY: the caller's slices have a vector from `at`.
        unsafe {
            self.best.store(best.as_mut_ptr().add(at));
            self.label.store(labels.as_mut_ptr().add(at).cast());
            if SECOND {
                self.second.store(second.as_mut_ptr().add(at));
            }
        }
    }

    /// Takes note of the scores of the centre `label`.
    #[inline(always)]
    unsafe fn update<const SECOND: bool>(&mut self, score: S, label: S) {
        // SAFETY: the instruction set is the caller's.
        unsafe {
            if SECOND {
                self.second = self.best.max(score).min(self.second);
            }
            self.label = score.less(self.best, label, self.label);
            self.best = score.min(self.best);
        }
    }
}

/// Few columns, as in product quantization: `VECTORS` vectors of rows at a time, or `SECONDS` with second scores, which
/// need registers too; then single ones.
#[inline(always)]
unsafe fn narrow<S: Simd, const NC: usize, const WIDTH: usize, const VECTORS: usize, const SECONDS: usize>(
    panels: &Panels,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    let rows = labels.len();
    // SAFETY: passed on to the caller.
    unsafe {
        if second.is_empty() {
            let whole = rows - rows % (VECTORS * S::LANES);
            rows_in_registers::<S, NC, WIDTH, VECTORS, false>(panels, 0..whole, labels, best, second);
            rows_in_registers::<S, NC, WIDTH, 1, false>(panels, whole..rows, labels, best, second);
        } else {
            let whole = rows - rows % (SECONDS * S::LANES);
            rows_in_registers::<S, NC, WIDTH, SECONDS, true>(panels, 0..whole, labels, best, second);
            rows_in_registers::<S, NC, WIDTH, 1, true>(panels, whole..rows, labels, best, second);
        }
    }
}

/// `VECTORS` vectors of rows stay in registers while all centres pass by.
#[inline(always)]
unsafe fn rows_in_registers<S: Simd, const NC: usize, const WIDTH: usize, const VECTORS: usize, const SECOND: bool>(
    panels: &Panels,
    rows: Range<usize>,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    // Unrolled by the compiler, the loop over the centres of a block would keep more in flight than there are registers.
    let block_centers = std::hint::black_box(NC);
    let ahead = &mut Ahead::new(panels, panels.half_norms.len() / NC * rows.len() / (VECTORS * S::LANES));
    for at in rows.step_by(VECTORS * S::LANES) {
        // SAFETY: there are `VECTORS` panels from row `at`; blocks are whole.
        unsafe {
            let rows = panels.rows.as_ptr().add(at / S::LANES * panels.stride);
            let mut x = [[S::splat(0.0); VECTORS]; WIDTH];
            let mut low = [Lowest { best: x[0][0], second: x[0][0], label: x[0][0] }; VECTORS];
            for v in 0..VECTORS {
                for t in 0..WIDTH {
                    x[t][v] = S::load(rows.add(v * panels.stride + t * S::LANES));
                }
                low[v] = Lowest::load::<SECOND>(labels, best, second, at + v * S::LANES);
            }
            let blocks = panels.half_norms.chunks_exact(NC).zip(panels.labels.chunks_exact(NC));
            for (block, (half_norms, names)) in blocks.enumerate() {
                ahead.fetch();
                let centers = panels.centers.as_ptr().add(block * WIDTH * NC);
                for j in 0..block_centers {
                    let mut score = [S::splat(*half_norms.as_ptr().add(j)); VECTORS];
                    for t in 0..WIDTH {
                        let c = S::splat(*centers.add(t * NC + j));
                        for v in 0..VECTORS {
                            score[v] = x[t][v].fnma(c, score[v]);
                        }
                    }
                    let label = S::splat(f32::from_bits(*names.as_ptr().add(j)));
                    for v in 0..VECTORS {
                        low[v].update::<SECOND>(score[v], label);
                    }
                }
            }
            for v in 0..VECTORS {
                low[v].store::<SECOND>(labels, best, second, at + v * S::LANES);
            }
        }
    }
}

/// Values of `NV` vectors of rows that stay in the first level cache while all centres pass by.
const CACHED: usize = 9216;

/// Any number of columns: tiles of `NV` vectors of rows, then of single ones.
#[inline(always)]
unsafe fn wide<S: Simd, const NV: usize, const NC: usize, const SECOND: bool>(
    panels: &Panels,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    let blocks = panels.half_norms.len() / NC;
    let whole = labels.len() - labels.len() % (NV * S::LANES);
    let ahead = &mut Ahead::new(panels, blocks * labels.len().div_ceil(NV * S::LANES));
    // Rows too wide for the cache pass by the block of centres instead.
    let step = if panels.width * NV * S::LANES > CACHED { 1 } else { blocks };
    // SAFETY: passed on to the caller.
    unsafe {
        for block in (0..blocks).step_by(step) {
            for first in (0..whole).step_by(NV * S::LANES) {
                tiles::<S, NV, NC, SECOND>(panels, block..block + step, first, ahead, labels, best, second);
            }
            for first in (whole..labels.len()).step_by(S::LANES) {
                tiles::<S, 1, NC, SECOND>(panels, block..block + step, first, ahead, labels, best, second);
            }
        }
    }
}

/// `NV` vectors of rows from row `first` on against blocks of `NC` centres.
#[inline(always)]
unsafe fn tiles<S: Simd, const NV: usize, const NC: usize, const SECOND: bool>(
    panels: &Panels,
    blocks: Range<usize>,
    first: usize,
    ahead: &mut Ahead,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    // SAFETY: the caller's blocks exist, and the panels from row `first`; a panel has `width * LANES` values, a block
    // `width * NC`; scores and labels have an entry a row.
    unsafe {
        let rows = panels.rows.as_ptr().add(first / S::LANES * panels.stride);
        let mut low = [Lowest::<S>::load::<SECOND>(labels, best, second, first); NV];
        for v in 1..NV {
            low[v] = Lowest::load::<SECOND>(labels, best, second, first + v * S::LANES);
        }
        for block in blocks {
            ahead.fetch();
            let centers = panels.centers.as_ptr().add(block * panels.width * NC);
            let half_norms = panels.half_norms.as_ptr().add(block * NC);
            let scores = scores::<S, NV, NC>(rows, panels.stride, centers, half_norms, panels.width);
            let names = panels.labels.as_ptr().add(block * NC);
            for j in 0..NC {
                let label = S::splat(f32::from_bits(*names.add(j)));
                for v in 0..NV {
                    low[v].update::<SECOND>(scores[j][v], label);
                }
            }
        }
        for v in 0..NV {
            low[v].store::<SECOND>(labels, best, second, first + v * S::LANES);
        }
    }
}

/// Scores of `NV` vectors of rows, `stride` values apart, and `NC` centres, all in registers.
#[inline(always)]
unsafe fn scores<S: Simd, const NV: usize, const NC: usize>(
    rows: *const f32,
    stride: usize,
    centers: *const f32,
    half_norms: *const f32,
    width: usize,
) -> [[S; NV]; NC] {
    // SAFETY: the caller's pointers have `width` columns.
    unsafe {
        let mut scores = [[S::splat(0.0); NV]; NC];
        for j in 0..NC {
            scores[j] = [S::splat(*half_norms.add(j)); NV];
        }
        for t in 0..width {
            let mut x = [S::splat(0.0); NV];
            for v in 0..NV {
                x[v] = S::load(rows.add(v * stride + t * S::LANES));
            }
            for j in 0..NC {
                let c = S::splat(*centers.add(t * NC + j));
                for v in 0..NV {
                    scores[j][v] = x[v].fnma(c, scores[j][v]);
                }
            }
        }
        scores
    }
}
