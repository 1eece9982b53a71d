//! The nearest of many centres: distances and the choice among them fused, for panels of rows.

use super::{check, Panels, Simd};

/// `NV` vectors of rows against blocks of `NC` centres.
#[inline(always)]
pub(in crate::kernels) unsafe fn nearest<S: Simd, const NV: usize, const NC: usize>(
    panels: &Panels,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    check::nearest(panels, labels, best, second, NV * S::LANES, NC);
    labels.fill(0);
    best.fill(f32::INFINITY);
    second.fill(f32::INFINITY);
    let seconds = !second.is_empty();
    // SAFETY: everything was checked; the instruction set is the caller's.
    unsafe {
        match (panels.width, seconds) {
            (1, _) => narrow_rows::<S, NV, NC, 1>(panels, labels, best, second),
            (2, _) => narrow_rows::<S, NV, NC, 2>(panels, labels, best, second),
            (3, _) => narrow_rows::<S, NV, NC, 3>(panels, labels, best, second),
            (4, _) => narrow_rows::<S, NV, NC, 4>(panels, labels, best, second),
            (_, false) => tiles::<S, NV, NC, false>(panels, labels, best, second),
            (_, true) => tiles::<S, NV, NC, true>(panels, labels, best, second),
        }
    }
}

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
                self.second = score.max(self.best).min(self.second);
            }
            self.label = score.less(self.best, label, self.label);
            self.best = score.min(self.best);
        }
    }
}

/// Up to 4 columns: all vectors of a panel at once, unless the second scores need their registers.
#[inline(always)]
unsafe fn narrow_rows<S: Simd, const NV: usize, const NC: usize, const WIDTH: usize>(
    panels: &Panels,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    // SAFETY: passed on to the caller.
    unsafe {
        if second.is_empty() {
            rows_in_registers::<S, NV, NC, WIDTH, NV, false>(panels, labels, best, second);
        } else {
            rows_in_registers::<S, NV, NC, WIDTH, 1, true>(panels, labels, best, second);
        }
    }
}

/// Few columns, as in product quantization: `VECTORS` vectors of rows stay in registers while all centres pass by.
#[inline(always)]
unsafe fn rows_in_registers<
    S: Simd,
    const NV: usize,
    const NC: usize,
    const WIDTH: usize,
    const VECTORS: usize,
    const SECOND: bool,
>(
    panels: &Panels,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    // Unrolled by the compiler, the loop over the centres of a block would keep more in flight than there are registers.
    let block_centers = std::hint::black_box(NC);
    for at in (0..labels.len()).step_by(VECTORS * S::LANES) {
        let (panel, v0) = (at / (NV * S::LANES), at / S::LANES % NV);
        // SAFETY: `VECTORS` divides `NV`, so that the vectors from `at` belong to one panel; blocks are whole.
        unsafe {
            let rows = panels.rows.as_ptr().add((panel * WIDTH * NV + v0) * S::LANES);
            let mut x = [[S::splat(0.0); VECTORS]; WIDTH];
            let mut low = [Lowest { best: x[0][0], second: x[0][0], label: x[0][0] }; VECTORS];
            for v in 0..VECTORS {
                for t in 0..WIDTH {
                    x[t][v] = S::load(rows.add((t * NV + v) * S::LANES));
                }
                low[v] = Lowest::load::<SECOND>(labels, best, second, at + v * S::LANES);
            }
            let blocks = panels.half_norms.chunks_exact(NC).zip(panels.labels.chunks_exact(NC));
            for (block, (half_norms, names)) in blocks.enumerate() {
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

/// Any number of columns: blocks of centres against panels of rows.
#[inline(always)]
unsafe fn tiles<S: Simd, const NV: usize, const NC: usize, const SECOND: bool>(
    panels: &Panels,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    let width = panels.width;
    let blocks = panels.centers.chunks_exact(width * NC).zip(panels.half_norms.chunks_exact(NC));
    for ((centers, half_norms), names) in blocks.zip(panels.labels.chunks_exact(NC)) {
        for (panel, rows) in panels.rows.chunks_exact(width * NV * S::LANES).enumerate() {
            // SAFETY: a block has `width * NC` values and a panel `width * NV * LANES`; scores and labels have
            // `NV * LANES` entries a panel.
            unsafe {
                let scores = tile::<S, NV, NC>(rows.as_ptr(), centers.as_ptr(), half_norms.as_ptr(), width);
                for v in 0..NV {
                    let at = (panel * NV + v) * S::LANES;
                    let mut low = Lowest::<S>::load::<SECOND>(labels, best, second, at);
                    for j in 0..NC {
                        low.update::<SECOND>(scores[j][v], S::splat(f32::from_bits(names[j])));
                    }
                    low.store::<SECOND>(labels, best, second, at);
                }
            }
        }
    }
}

/// Scores of `NV` vectors of rows and `NC` centres, all in registers.
#[inline(always)]
unsafe fn tile<S: Simd, const NV: usize, const NC: usize>(
    rows: *const f32,
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
                x[v] = S::load(rows.add((t * NV + v) * S::LANES));
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
