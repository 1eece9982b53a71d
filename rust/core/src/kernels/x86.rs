//! AVX2 and AVX-512: the vector operations, and the functions that switch them on for a whole loop.

use super::scalar;
use super::simd::{self, Simd, Widen};
use super::{check, BooksView, Ids, Kernels, LevelsView, Panels, Products};
use std::arch::x86_64::*;

/// The tables that this CPU can run.
pub(super) fn available() -> Vec<&'static Kernels> {
    let mut all = Vec::new();
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        all.push(&AVX2);
        let wide = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
        if wide && is_x86_feature_detected!("avx512f") {
            all.push(&AVX512);
        }
    }
    all
}

/// 12 sums of 16 registers. One vector of rows more would not leave room for the centre.
static AVX2: Kernels = Kernels {
    name: "avx2",
    panel_rows: 16,
    block_centers: 6,
    panel_centers: 16,
    lookup_books,
    lookup_levels,
    pack: pack::<16>,
    nearest: avx2_nearest,
    dots: avx2_dots,
    distances: avx2_distances,
    axpy,
    add,
    max_into,
    carries,
};

/// 24 sums of 32 registers. Lookups wait for memory, so that wider vectors would not help them.
static AVX512: Kernels = Kernels {
    name: "avx512",
    panel_rows: 48,
    block_centers: 8,
    panel_centers: 32,
    lookup_books,
    lookup_levels,
    pack: pack::<48>,
    nearest: avx512_nearest,
    dots: avx512_dots,
    distances: avx512_distances,
    axpy,
    add,
    max_into,
    carries,
};

/// A safe function around a body that is compiled for more features than the crate.
macro_rules! shell {
    ($features:literal, fn $name:ident($($argument:ident: $type:ty),*) = $body:expr) => {
        fn $name($($argument: $type),*) {
            #[target_feature(enable = $features)]
            unsafe fn inside($($argument: $type),*) {
                // SAFETY: this function has the features of the body's vectors.
                unsafe { $body($($argument),*) }
            }
            // SAFETY: the tables of this file are handed out only where the CPU has the features.
            unsafe { inside($($argument),*) }
        }
    };
}

shell!("avx2,fma,f16c", fn lookup_books(view: &BooksView, codes: &[u8], ids: Ids, out: &mut [f32])
    = simd::lookup_books::<Eight>);
shell!("avx2,fma,f16c", fn lookup_levels(view: &LevelsView, codes: &[u8], ids: Ids, out: &mut [f32])
    = simd::lookup_levels::<Eight>);
shell!("avx2,fma,f16c", fn axpy(out: &mut [f32], x: &[f32], weight: f32) = simd::axpy::<Eight>);
shell!("avx2,fma,f16c", fn add(out: &mut [f32], x: &[f32]) = simd::add::<Eight>);
shell!("avx2,fma,f16c", fn max_into(out: &mut [f32], x: &[f32]) = simd::max_into::<Eight>);
shell!("avx2,fma,f16c", fn avx2_nearest(task: &Panels, labels: &mut [u32], best: &mut [f32], second: &mut [f32])
    = simd::nearest::<Eight, 2, 6>);
shell!("avx2,fma,f16c", fn avx2_dots(task: &Products, out: &mut [f32]) = simd::products::<Eight, 2, 6, false>);
shell!("avx2,fma,f16c", fn avx2_distances(task: &Products, out: &mut [f32]) = simd::products::<Eight, 2, 4, true>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c",
    fn avx512_nearest(task: &Panels, labels: &mut [u32], best: &mut [f32], second: &mut [f32])
    = simd::nearest::<Sixteen, 3, 8>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", fn avx512_dots(task: &Products, out: &mut [f32])
    = simd::products::<Sixteen, 2, 12, false>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", fn avx512_distances(task: &Products, out: &mut [f32])
    = simd::products::<Sixteen, 2, 12, true>);

fn carries(words: &[u32], mask: u32, one: u32) -> u32 {
    #[target_feature(enable = "avx2")]
    fn inside(words: &[u32], mask: u32, one: u32) -> u32 {
        scalar::carries(words, mask, one)
    }
    // SAFETY: the tables of this file are handed out only where the CPU has the feature.
    unsafe { inside(words, mask, one) }
}

fn pack<const PANEL: usize>(x: &[f32], stride: usize, rows: usize, shift: &[f32], out: &mut [f32]) {
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

/// Eight numbers in an AVX register.
#[derive(Clone, Copy)]
struct Eight(__m256);

/// Sixteen numbers in an AVX-512 register.
#[derive(Clone, Copy)]
struct Sixteen(__m512);

/// Operations that are one expression.
macro_rules! operations {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $out:ty = $body:expr;)*) => {
        $(#[inline(always)]
        unsafe fn $name($($argument: $type),*) -> $out {
            // SAFETY: the caller has the instruction set, and pointers to all numbers that are read or written.
            unsafe { $body }
        })*
    };
}

// `self` is not an identifier that a macro can take: methods are listed with their names for it.
macro_rules! arithmetic {
    ($vector:ident, $add:ident, $sub:ident, $mul:ident, $fma:ident, $fnma:ident, $store:ident) => {
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller has the instruction set and room for a vector.
            unsafe { $store(to, self.0) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the caller has the instruction set.
            $vector(unsafe { $add(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: the caller has the instruction set.
            $vector(unsafe { $sub(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: the caller has the instruction set.
            $vector(unsafe { $mul(self.0, other.0) })
        }
        #[inline(always)]
        unsafe fn fma(self, factor: Self, sum: Self) -> Self {
            // SAFETY: the caller has the instruction set.
            $vector(unsafe { $fma(self.0, factor.0, sum.0) })
        }
        #[inline(always)]
        unsafe fn fnma(self, factor: Self, sum: Self) -> Self {
            // SAFETY: the caller has the instruction set.
            $vector(unsafe { $fnma(self.0, factor.0, sum.0) })
        }
    };
}

impl Simd for Eight {
    const LANES: usize = 8;
    arithmetic!(
        Eight,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_fmadd_ps,
        _mm256_fnmadd_ps,
        _mm256_storeu_ps
    );
    operations! {
        fn splat(value: f32) -> Self = Eight(_mm256_set1_ps(value));
        fn load(from: *const f32) -> Self = Eight(_mm256_loadu_ps(from));
    }
    #[inline(always)]
    unsafe fn less(self, other: Self, yes: Self, no: Self) -> Self {
        // SAFETY: the caller has the instruction set. A blend takes its second operand where the mask is set.
        unsafe { Eight(_mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, other.0))) }
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: the caller has the instruction set, whose minimum is `a < b ? a : b`.
        Eight(unsafe { _mm256_min_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the caller has the instruction set, whose maximum is `a > b ? a : b`.
        Eight(unsafe { _mm256_max_ps(self.0, other.0) })
    }
}

impl Widen for Eight {
    operations! {
        fn load_f16(from: *const u16) -> Self = Eight(_mm256_cvtph_ps(_mm_loadu_si128(from.cast())));
        fn load_bf16(from: *const u16) -> Self = {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Eight(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        };
        fn load_u8(from: *const u8) -> Self = {
            Eight(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))))
        };
        fn load_u4(from: *const u8) -> Self = {
            let all = _mm256_set1_epi32(from.cast::<i32>().read_unaligned());
            let each = _mm256_srlv_epi32(all, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
            Eight(_mm256_cvtepi32_ps(_mm256_and_si256(each, _mm256_set1_epi32(15))))
        };
        fn load_u2(from: *const u8) -> Self = {
            let all = _mm256_set1_epi32(i32::from(from.cast::<u16>().read_unaligned()));
            let each = _mm256_srlv_epi32(all, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
            Eight(_mm256_cvtepi32_ps(_mm256_and_si256(each, _mm256_set1_epi32(3))))
        };
        fn one_f16(bits: u16) -> f32 = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))));
    }
    #[inline(always)]
    fn prefetch(address: *const u8) {
        // SAFETY: a prefetch does not fault, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}

impl Simd for Sixteen {
    const LANES: usize = 16;
    arithmetic!(
        Sixteen,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_fmadd_ps,
        _mm512_fnmadd_ps,
        _mm512_storeu_ps
    );
    operations! {
        fn splat(value: f32) -> Self = Sixteen(_mm512_set1_ps(value));
        fn load(from: *const f32) -> Self = Sixteen(_mm512_loadu_ps(from));
    }
    #[inline(always)]
    unsafe fn less(self, other: Self, yes: Self, no: Self) -> Self {
        // SAFETY: the caller has the instruction set. A blend takes its second operand where the mask is set.
        unsafe { Sixteen(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0), no.0, yes.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: the caller has the instruction set, whose minimum is `a < b ? a : b`.
        Sixteen(unsafe { _mm512_min_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the caller has the instruction set, whose maximum is `a > b ? a : b`.
        Sixteen(unsafe { _mm512_max_ps(self.0, other.0) })
    }
}
