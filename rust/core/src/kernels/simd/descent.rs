//! Iterated local search of sums of codebook entries: the scores of one book's entries, and the lowest of them.

use super::{Descent, Widen};
use crate::kernels::scalar::{self, Refresh, BEAM_LANES};
use std::marker::PhantomData;

/// `NV` vectors of scores at a time: a divisor of [`BEAM_LANES`], or a multiple.
#[inline(always)]
pub(in crate::kernels) unsafe fn descend<S: Widen, const NV: usize>(
    task: &Descent,
    codes: &mut [u16],
    scores: &mut [f32],
) {
    // SAFETY: the instruction set is the caller's.
    unsafe { scalar::descend_by::<Vectors<S, NV>>(task, codes, scores) }
}

/// Loops over vectors.
struct Vectors<S, const NV: usize>(PhantomData<S>);

/// The lowest scores of the lanes, and the first place of each vector that they come from: places are exact in single
/// precision.
struct Lowest<S, const NV: usize> {
    values: [S; NV],
    places: [S; NV],
}

impl<S: Widen, const NV: usize> Vectors<S, NV> {
    /// Brings `N` vectors of scores from `from` up to date.
    #[inline(always)]
    unsafe fn part<const N: usize>(
        scores: *mut f32,
        start: Option<(&[f32], &[f32])>,
        rows: &[(f32, &[u16])],
        from: usize,
        lowest: &mut Lowest<S, NV>,
    ) {
        // SAFETY: the caller's slices have numbers up to there.
        unsafe {
            let at = |v: usize| from + v * S::LANES;
            let mut sums = [S::splat(0.0); N];
            for v in 0..N {
                sums[v] = match start {
                    Some((half_norms, products)) => {
                        S::load(half_norms.as_ptr().add(at(v))).sub(S::load(products.as_ptr().add(at(v))))
                    }
                    None => S::load(scores.add(at(v))),
                };
            }
            for (factor, row) in rows {
                let factor = S::splat(*factor);
                for v in 0..N {
                    sums[v] = S::load_f16(row.as_ptr().add(at(v))).fma(factor, sums[v]);
                }
            }
            for v in 0..N {
                sums[v].store(scores.add(at(v)));
                let place = S::splat(at(v) as f32);
                lowest.places[v] = sums[v].less(lowest.values[v], place, lowest.places[v]);
                lowest.values[v] = sums[v].min(lowest.values[v]);
            }
        }
    }
}

impl<S: Widen, const NV: usize> Refresh for Vectors<S, NV> {
    #[inline(always)]
    unsafe fn half(bits: u16) -> f32 {
        // SAFETY: the instruction set is the caller's.
        unsafe { S::one_f16(bits) }
    }

    #[inline(always)]
    unsafe fn refresh(scores: &mut [f32], start: Option<(&[f32], &[f32])>, rows: &[(f32, &[u16])]) -> usize {
        let count = scores.len();
        let fits = |len: usize| len >= count;
        assert!(count.is_multiple_of(BEAM_LANES) && rows.iter().all(|(_, row)| fits(row.len())), "rows of products");
        assert!(start.is_none_or(|(half_norms, products)| fits(half_norms.len()) && fits(products.len())), "scores");
        // SAFETY: all slices have `count` numbers, a multiple of all vectors; the instruction set is the caller's.
        unsafe {
            let (none, zero) = (S::splat(f32::INFINITY), S::splat(0.0));
            let mut lowest = Lowest { values: [none; NV], places: [zero; NV] };
            let scores = scores.as_mut_ptr();
            let mut from = 0;
            while from + NV * S::LANES <= count {
                Self::part::<NV>(scores, start, rows, from, &mut lowest);
                from += NV * S::LANES;
            }
            while from < count {
                Self::part::<1>(scores, start, rows, from, &mut lowest);
                from += S::LANES;
            }
            // Of equal scores in a lane the lowest place wins.
            let (mut value, mut place) = (lowest.values[0], lowest.places[0]);
            for v in 1..NV {
                let (other, its) = (lowest.values[v], lowest.places[v]);
                place = other.less(value, its, value.less(other, place, its.min(place)));
                value = other.min(value);
            }
            first_lowest(value, place)
        }
    }

    #[inline(always)]
    unsafe fn fetch(row: &[u16]) {
        for line in (0..row.len()).step_by(32) {
            S::prefetch(row.as_ptr().wrapping_add(line).cast());
        }
    }
}

/// The place of the lowest number, the first of equals; 0 if there is none.
#[inline(always)]
unsafe fn first_lowest<S: Widen>(values: S, places: S) -> usize {
    let (mut numbers, mut first) = ([f32::INFINITY; BEAM_LANES], [0f32; BEAM_LANES]);
    // SAFETY: the arrays hold a vector; the instruction set is the caller's.
    unsafe {
        values.store(numbers.as_mut_ptr());
        places.store(first.as_mut_ptr());
    }
    first.iter_mut().enumerate().for_each(|(lane, place)| *place += lane as f32);
    // Halves are compared with each other; lanes that the vector has not are infinite.
    let mut half = BEAM_LANES / 2;
    while half > 0 {
        for lane in 0..half {
            let (other, its) = (numbers[lane + half], first[lane + half]);
            let wins = other < numbers[lane] || (other == numbers[lane] && its < first[lane]);
            (numbers[lane], first[lane]) = if wins { (other, its) } else { (numbers[lane], first[lane]) };
        }
        half /= 2;
    }
    if numbers[0] < f32::INFINITY {
        first[0] as usize
    } else {
        0
    }
}
