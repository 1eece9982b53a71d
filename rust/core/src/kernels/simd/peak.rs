//! A yardstick: how fast this CPU multiplies and adds when nothing else holds it up.

use super::Simd;
use crate::kernels::PEAK_FMAS;

/// `rounds` times [`PEAK_FMAS`] fused multiply-adds in `CHAINS` chains, enough to hide the latency of one.
#[inline(always)]
pub(in crate::kernels) unsafe fn fma_peak<S: Simd, const CHAINS: usize>(rounds: usize) -> f32 {
    // Unknown to the compiler, which would compute the result beforehand.
    let (factor, summand) = std::hint::black_box((0.5, 0.5));
    // SAFETY: the instruction set is the caller's.
    unsafe {
        let (factor, summand) = (S::splat(factor), S::splat(summand));
        let mut sums = [summand; CHAINS];
        for c in 0..CHAINS {
            sums[c] = S::splat(std::hint::black_box(c as f32));
        }
        for _ in 0..rounds * (PEAK_FMAS / (CHAINS * S::LANES)) {
            for c in 0..CHAINS {
                sums[c] = sums[c].fma(factor, summand);
            }
        }
        let mut total = sums[0];
        for c in 1..CHAINS {
            total = total.add(sums[c]);
        }
        let mut lanes = [0.0; 16];
        assert!(S::LANES <= lanes.len());
        total.store(lanes.as_mut_ptr());
        lanes[0]
    }
}
