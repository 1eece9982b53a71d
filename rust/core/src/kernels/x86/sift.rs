//! The nearest centres by a first pass in bfloat16, which multiplies twice as many numbers at a time: blocks of centres
//! that are certainly too far are left out, the others compared in float32.

use crate::kernels::simd::Ahead;
use crate::kernels::{check, Coarse, Panels, Sifting};
use std::arch::x86_64::*;

/// Centres of a block.
const NC: usize = 8;

/// Vectors of rows in a tile: 24 sums of 32 registers.
const NV: usize = 3;

const LANES: usize = 16;

/// Comparisons of a row and a block in float32 that go on side by side.
const SIDE: usize = 4;

pub(super) fn sift(
    panels: &Panels,
    coarse: &Coarse,
    sifting: &mut Sifting,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) -> bool {
    check::nearest(panels, labels, best, second, LANES, NC);
    check::coarse(panels, coarse, NC);
    labels.fill(0);
    best.fill(f32::INFINITY);
    second.fill(f32::INFINITY);
    let whole = labels.len() - labels.len() % (NV * LANES);
    let blocks = panels.half_norms.len() / NC;
    let ahead = &mut Ahead::new(panels, blocks * labels.len().div_ceil(NV * LANES));
    // From here on comparing all in float32 is as fast.
    let most = |rows: usize| rows * (blocks / 8 + 2);
    for first in (0..whole).step_by(NV * LANES) {
        // SAFETY: checked; the table with this function is handed out only where the CPU has the features.
        unsafe { candidates::<NV>(panels, coarse, sifting, ahead, first, !second.is_empty()) };
        if sifting.candidates.len() > most(NV * LANES) {
            return false;
        }
        // SAFETY: as before; candidates are rows and blocks that exist.
        unsafe { compare(panels, &sifting.candidates, labels, best, second) };
    }
    for first in (whole..labels.len()).step_by(LANES) {
        // SAFETY: as before.
        unsafe { candidates::<1>(panels, coarse, sifting, ahead, first, !second.is_empty()) };
        if sifting.candidates.len() > most(LANES) {
            return false;
        }
        // SAFETY: as before.
        unsafe { compare(panels, &sifting.candidates, labels, best, second) };
    }
    true
}

/// Finds the blocks that may have the nearest centre of `V` vectors of rows from row `first` on.
///
/// With x' and c' the rounded row and centre, |<x, c> - <x', c'>| <= |x - x'| |c| + |x'| |c - c'|. To that comes the
/// rounding of both chains: with u = 2^-24, `width` steps of at most u (|c|^2 / 2 + |x| |c|) in float32, and `width + 2`
/// of twice as much here, whatever way the CPU rounds; and 2^-125 a step for numbers that it takes for zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn candidates<const V: usize>(
    panels: &Panels,
    coarse: &Coarse,
    sifting: &mut Sifting,
    ahead: &mut Ahead,
    first: usize,
    seconds: bool,
) {
    let (width, pairs) = (panels.width, panels.width.div_ceil(2));
    let blocks = panels.half_norms.len() / NC;
    let Sifting { rows, minima, candidates } = sifting;
    rows.resize(pairs * V * LANES, 0);
    minima.resize(blocks * V * LANES, 0.0);
    candidates.clear();
    // SAFETY: the caller's panels exist; `rows` has `V` vectors a pair of columns, `minima` as many a block.
    unsafe {
        let mut reach = [_mm512_setzero_ps(); V];
        for v in 0..V {
            let from = panels.rows.as_ptr().add((first / LANES + v) * panels.stride);
            let (mut norm, mut error) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            for p in 0..pairs {
                let mut words = [_mm512_setzero_si512(); 2];
                for t in 2 * p..width.min(2 * p + 2) {
                    let x = _mm512_loadu_ps(from.add(t * LANES));
                    let halves: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(x));
                    words[t - 2 * p] = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves));
                    let lost = _mm512_sub_ps(x, _mm512_castsi512_ps(words[t - 2 * p]));
                    norm = _mm512_fmadd_ps(x, x, norm);
                    error = _mm512_fmadd_ps(lost, lost, error);
                }
                let pair = _mm512_or_si512(_mm512_srli_epi32::<16>(words[0]), words[1]);
                // The score has the product's negative.
                let pair = _mm512_xor_si512(pair, _mm512_set1_epi32(0x8000_8000_u32 as i32));
                _mm512_storeu_si512(rows.as_mut_ptr().add((p * V + v) * LANES).cast(), pair);
            }
            // The roots of sums that were rounded `width` times, and of squares that may have been too small.
            let rounded = _mm512_set1_ps(1.0 + width as f32 * f32::EPSILON);
            let tiny = _mm512_set1_ps(width as f32 * 1e-22);
            let norm = _mm512_fmadd_ps(_mm512_sqrt_ps(norm), rounded, tiny);
            let error = _mm512_fmadd_ps(_mm512_sqrt_ps(error), rounded, tiny);
            let (far, lost) = (coarse.reach, coarse.error);
            let chain = _mm512_fmadd_ps(norm, _mm512_set1_ps(far), _mm512_set1_ps(far * far / 2.0));
            let chain = _mm512_mul_ps(chain, _mm512_set1_ps((width + 2) as f32 * 2.0 * f32::EPSILON));
            let both = _mm512_mul_ps(error, _mm512_set1_ps(far));
            let both = _mm512_fmadd_ps(_mm512_add_ps(norm, error), _mm512_set1_ps(lost), both);
            reach[v] = _mm512_add_ps(_mm512_add_ps(both, chain), _mm512_set1_ps(width as f32 * 1e-35));
            reach[v] = _mm512_add_ps(reach[v], reach[v]);
            if seconds {
                let sum = _mm512_add_ps(norm, _mm512_set1_ps(far));
                let moved = _mm512_mul_ps(_mm512_mul_ps(sum, sum), _mm512_set1_ps(4.0 * f32::EPSILON));
                reach[v] = _mm512_add_ps(reach[v], _mm512_add_ps(moved, _mm512_add_ps(chain, chain)));
            }
        }
        let mut low = [_mm512_set1_ps(f32::INFINITY); V];
        for block in 0..blocks {
            ahead.fetch();
            let half_norms = panels.half_norms.as_ptr().add(block * NC);
            let centers = coarse.pairs.as_ptr().add(block * pairs * NC);
            let mut scores = [[low[0]; V]; NC];
            for j in 0..NC {
                scores[j] = [_mm512_set1_ps(*half_norms.add(j)); V];
            }
            for p in 0..pairs {
                let mut x = [_mm512_setzero_si512(); V];
                for v in 0..V {
                    x[v] = _mm512_loadu_si512(rows.as_ptr().add((p * V + v) * LANES).cast());
                }
                for j in 0..NC {
                    let c: __m512bh = std::mem::transmute(_mm512_set1_epi32(*centers.add(p * NC + j) as i32));
                    for v in 0..V {
                        scores[j][v] =
                            _mm512_dpbf16_ps(scores[j][v], std::mem::transmute::<__m512i, __m512bh>(x[v]), c);
                    }
                }
            }
            for v in 0..V {
                let mut lowest = scores[0][v];
                for j in 1..NC {
                    lowest = _mm512_min_ps(scores[j][v], lowest);
                }
                _mm512_storeu_ps(minima.as_mut_ptr().add((block * V + v) * LANES), lowest);
                low[v] = _mm512_min_ps(lowest, low[v]);
            }
        }
        for v in 0..V {
            low[v] = _mm512_add_ps(low[v], reach[v]);
        }
        for block in 0..blocks {
            for v in 0..V {
                let lowest = _mm512_loadu_ps(minima.as_ptr().add((block * V + v) * LANES));
                // Not greater: with a limit that is no number all are candidates.
                let mut near = _mm512_cmp_ps_mask::<_CMP_NGT_UQ>(lowest, low[v]);
                while near != 0 {
                    candidates.push(((first + v * LANES) as u32 + near.trailing_zeros(), block as u32));
                    near &= near - 1;
                }
            }
        }
    }
}

/// Compares rows with the centres of blocks in float32, in the order given.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn compare(
    panels: &Panels,
    candidates: &[(u32, u32)],
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    for chunk in candidates.chunks(SIDE) {
        let mut all = [[0.0f32; NC]; SIDE];
        // SAFETY: rows and blocks of candidates exist.
        unsafe {
            let mut rows = [panels.rows.as_ptr(); SIDE];
            let mut centers = [panels.centers.as_ptr(); SIDE];
            let mut scores = [_mm256_setzero_ps(); SIDE];
            for (i, (row, block)) in chunk.iter().map(|(row, block)| (*row as usize, *block as usize)).enumerate() {
                rows[i] = rows[i].add(row / LANES * panels.stride + row % LANES);
                centers[i] = centers[i].add(block * panels.width * NC);
                scores[i] = _mm256_loadu_ps(panels.half_norms.as_ptr().add(block * NC));
            }
            for t in 0..panels.width {
                for i in 0..SIDE {
                    let x = _mm256_set1_ps(*rows[i].add(t * LANES));
                    scores[i] = _mm256_fnmadd_ps(x, _mm256_loadu_ps(centers[i].add(t * NC)), scores[i]);
                }
            }
            for i in 0..SIDE {
                _mm256_storeu_ps(all[i].as_mut_ptr(), scores[i]);
            }
        }
        for ((row, block), scores) in chunk.iter().map(|(row, block)| (*row as usize, *block as usize)).zip(&all) {
            for (label, score) in panels.labels[block * NC..].iter().zip(scores) {
                if *score < best[row] {
                    if !second.is_empty() {
                        second[row] = best[row];
                    }
                    (best[row], labels[row]) = (*score, *label);
                } else if !second.is_empty() && *score < second[row] {
                    second[row] = *score;
                }
            }
        }
    }
}
