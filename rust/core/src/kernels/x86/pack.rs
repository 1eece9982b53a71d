//! Row-major rows transposed into panels.

use crate::kernels::{check, scalar};
use std::arch::x86_64::*;

pub(super) fn pack<const PANEL: usize>(x: &[f32], stride: usize, rows: usize, shift: &[f32], out: &mut [f32]) {
    check::pack(x, stride, rows, shift, out, PANEL);
    // SAFETY: checked just now; the tables of this file are handed out only where the CPU has the features.
    unsafe { pack_panels::<PANEL>(x, stride, rows, shift, out) }
}

/// Squares of 8 rows and 8 columns, or 4 and 4, are turned in registers; the edges are left to plain loops.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pack_panels<const PANEL: usize>(x: &[f32], stride: usize, rows: usize, shift: &[f32], out: &mut [f32]) {
    let (width, whole) = (shift.len(), shift.len() - shift.len() % 8);
    for (panel, out) in out.chunks_exact_mut(PANEL * width).enumerate() {
        let first = panel * PANEL;
        if first + PANEL > rows {
            scalar::pack::<PANEL>(&x[first * stride..], stride, rows - first, shift, out);
            return;
        }
        for group in (0..PANEL).step_by(8) {
            for t in (0..whole).step_by(8) {
                // SAFETY: rows `first + group` to `+ 7` and columns `t` to `t + 7` exist, and so do their places.
                unsafe {
                    let from = x.as_ptr().add((first + group) * stride + t);
                    let shift = _mm256_loadu_ps(shift.as_ptr().add(t));
                    transpose(from, stride, shift, out.as_mut_ptr().add(t * PANEL + group), PANEL);
                }
            }
            let mut rest = whole;
            if width - rest >= 4 {
                for r in [group, group + 4] {
                    // SAFETY: rows `first + r` to `+ 3` and columns `rest` to `rest + 3` exist, and so do their places.
                    unsafe {
                        let from = x.as_ptr().add((first + r) * stride + rest);
                        let shift = _mm_loadu_ps(shift.as_ptr().add(rest));
                        transpose_fours(from, stride, shift, out.as_mut_ptr().add(rest * PANEL + r), PANEL);
                    }
                }
                rest += 4;
            }
            for t in rest..width {
                for r in group..group + 8 {
                    out[t * PANEL + r] = x[(first + r) * stride + t] - shift[t];
                }
            }
        }
    }
}

/// Row `j` of the output is column `j` of the input, less `shift[j]`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn transpose(from: *const f32, stride: usize, shift: __m256, to: *mut f32, to_stride: usize) {
    // SAFETY: the caller's pointers have 8 rows of 8 numbers each.
    unsafe {
        let mut row = [shift; 8];
        for r in 0..8 {
            row[r] = _mm256_sub_ps(_mm256_loadu_ps(from.add(r * stride)), shift);
        }
        // Pairs of rows interleaved, then fours, then the halves of the registers exchanged.
        let mut pair = row;
        for r in 0..4 {
            pair[2 * r] = _mm256_unpacklo_ps(row[2 * r], row[2 * r + 1]);
            pair[2 * r + 1] = _mm256_unpackhi_ps(row[2 * r], row[2 * r + 1]);
        }
        let mut four = row;
        for half in [0, 4] {
            four[half] = _mm256_shuffle_ps::<0x44>(pair[half], pair[half + 2]);
            four[half + 1] = _mm256_shuffle_ps::<0xee>(pair[half], pair[half + 2]);
            four[half + 2] = _mm256_shuffle_ps::<0x44>(pair[half + 1], pair[half + 3]);
            four[half + 3] = _mm256_shuffle_ps::<0xee>(pair[half + 1], pair[half + 3]);
        }
        for j in 0..4 {
            let (low, high) = (four[j], four[j + 4]);
            _mm256_storeu_ps(to.add(j * to_stride), _mm256_permute2f128_ps::<0x20>(low, high));
            _mm256_storeu_ps(to.add((j + 4) * to_stride), _mm256_permute2f128_ps::<0x31>(low, high));
        }
    }
}

/// [`transpose`] for 4 rows and 4 columns.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn transpose_fours(from: *const f32, stride: usize, shift: __m128, to: *mut f32, to_stride: usize) {
    // SAFETY: the caller's pointers have 4 rows of 4 numbers each.
    unsafe {
        let mut row = [shift; 4];
        for r in 0..4 {
            row[r] = _mm_sub_ps(_mm_loadu_ps(from.add(r * stride)), shift);
        }
        let [a, b, c, d] = &mut row;
        _MM_TRANSPOSE4_PS(a, b, c, d);
        for j in 0..4 {
            _mm_storeu_ps(to.add(j * to_stride), row[j]);
        }
    }
}
