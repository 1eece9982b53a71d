//! Products of rows and centres.

use super::{check, Products, Simd};

/// Products of `NR` rows and `NV` vectors of centres at a time. `SQUARES`: squared distances instead.
#[inline(always)]
pub(in crate::kernels) unsafe fn products<S: Simd, const NV: usize, const NR: usize, const SQUARES: bool>(
    task: &Products,
    out: &mut [f32],
) {
    let lanes = NV * S::LANES;
    check::products(task, out, lanes);
    for first in (0..task.rows).step_by(NR) {
        // Past the last row its values are computed again and not written.
        let starts: [*const f32; NR] =
            std::array::from_fn(|r| task.x[(first + r).min(task.rows - 1) * task.stride..].as_ptr());
        let rows = NR.min(task.rows - first);
        for (panel, centers) in task.centers.chunks_exact(lanes * task.width).enumerate() {
            // SAFETY: each start is followed by `width` values, a panel has `width * lanes`.
            let sums = unsafe { product_tile::<S, NV, NR, SQUARES>(&starts, centers.as_ptr(), task.width) };
            let columns = lanes.min(task.count - panel * lanes);
            for r in 0..NR {
                if r < rows {
                    let out = &mut out[(first + r) * task.count + panel * lanes..][..columns];
                    // SAFETY: the instruction set is the caller's.
                    unsafe { store_row(sums[r], out) };
                }
            }
        }
    }
}

/// Writes the first `out.len()` values of `NV` vectors.
#[inline(always)]
unsafe fn store_row<S: Simd, const NV: usize>(sums: [S; NV], out: &mut [f32]) {
    if out.len() == NV * S::LANES {
        for v in 0..NV {
            // SAFETY: `out` holds `NV` vectors.
            unsafe { sums[v].store(out.as_mut_ptr().add(v * S::LANES)) };
        }
        return;
    }
    for (v, out) in out.chunks_mut(S::LANES).enumerate() {
        let mut values = [0.0; 16];
        assert!(S::LANES <= values.len());
        // SAFETY: a vector fits `values`.
        unsafe { sums[v].store(values.as_mut_ptr()) };
        out.copy_from_slice(&values[..out.len()]);
    }
}

#[inline(always)]
unsafe fn product_tile<S: Simd, const NV: usize, const NR: usize, const SQUARES: bool>(
    rows: &[*const f32; NR],
    centers: *const f32,
    width: usize,
) -> [[S; NV]; NR] {
    // SAFETY: the caller's pointers have `width` columns.
    unsafe {
        let mut sums = [[S::splat(0.0); NV]; NR];
        for t in 0..width {
            let mut c = [S::splat(0.0); NV];
            for v in 0..NV {
                c[v] = S::load(centers.add((t * NV + v) * S::LANES));
            }
            for r in 0..NR {
                let x = S::splat(*rows[r].add(t));
                for v in 0..NV {
                    let (a, b) = if SQUARES { (x.sub(c[v]), x.sub(c[v])) } else { (x, c[v]) };
                    sums[r][v] = a.fma(b, sums[r][v]);
                }
            }
        }
        sums
    }
}
