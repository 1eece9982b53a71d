//! The vector operations of AVX2 and AVX-512.

use crate::kernels::simd::{Entries, Pack, Simd, Task, Trace, Widen, CACHE, STREAM};
use std::arch::x86_64::*;

/// Eight numbers in an AVX register.
#[derive(Clone, Copy)]
pub(super) struct Eight(pub(super) __m256);

/// Sixteen numbers in an AVX-512 register.
#[derive(Clone, Copy)]
pub(super) struct Sixteen(pub(super) __m512);

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

/// Writes 16 bytes in one of the ways of [`Widen`].
#[inline(always)]
unsafe fn write_16<const WAY: u8>(to: *mut u16, numbers: __m128i) {
    // SAFETY: the caller has room, aligned where it is streamed.
    unsafe {
        match WAY {
            CACHE => _mm_storeu_si128(to.cast(), numbers),
            _ => _mm_stream_si128(to.cast(), numbers),
        }
    }
}

/// Writes 32 bytes in one of the ways of [`Widen`].
#[inline(always)]
unsafe fn write_32<const WAY: u8>(to: *mut u16, numbers: __m256i) {
    // SAFETY: the caller has the instruction set, and room, aligned where it is streamed.
    unsafe {
        match WAY {
            CACHE => _mm256_storeu_si256(to.cast(), numbers),
            STREAM => _mm256_stream_si256(to.cast(), numbers),
            _ => {
                write_16::<WAY>(to, _mm256_castsi256_si128(numbers));
                write_16::<WAY>(to.add(8), _mm256_extracti128_si256::<1>(numbers));
            }
        }
    }
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

/// For each width of integers: the two bytes that hold each of sixteen, spread to 32 bits.
static SPREAD: [[u8; 64]; 16] = {
    let mut all = [[0x80; 64]; 16];
    let mut bits = 1;
    while bits <= 8 {
        let mut lane = 0;
        while lane < 16 {
            all[bits][4 * lane] = (lane * bits / 8) as u8;
            all[bits][4 * lane + 1] = (lane * bits / 8 + 1) as u8 & 15;
            lane += 1;
        }
        bits += 1;
    }
    all
};

/// For each width of integers: where each of sixteen starts in its first byte.
static SHIFTS: [[u32; 16]; 16] = {
    let mut all = [[0; 16]; 16];
    let mut bits = 1;
    while bits <= 8 {
        let mut lane = 0;
        while lane < 16 {
            all[bits][lane] = (lane * bits % 8) as u32;
            lane += 1;
        }
        bits += 1;
    }
    all
};

/// Eight integers of `bits` bits, low bits first. Reads eight bytes.
#[inline(always)]
unsafe fn eight_fields(from: *const u8, bits: u32) -> __m256i {
    // SAFETY: the caller has the instruction set and eight bytes; tables have an entry for each width.
    unsafe {
        let all = _mm256_broadcastsi128_si256(_mm_loadl_epi64(from.cast()));
        let spread = _mm256_shuffle_epi8(all, _mm256_loadu_si256(SPREAD[bits as usize & 15].as_ptr().cast()));
        let each = _mm256_srlv_epi32(spread, _mm256_loadu_si256(SHIFTS[bits as usize & 15].as_ptr().cast()));
        _mm256_and_si256(each, _mm256_set1_epi32((1 << bits) - 1))
    }
}

/// Sixteen integers of `bits` bits, low bits first. Reads eight bytes, or sixteen above 4 bits.
#[inline(always)]
unsafe fn sixteen_fields(from: *const u8, bits: u32) -> __m512i {
    // SAFETY: the caller has the instruction set and the bytes; tables have an entry for each width.
    unsafe {
        let all = if bits <= 4 { _mm_loadl_epi64(from.cast()) } else { _mm_loadu_si128(from.cast()) };
        let all = _mm512_broadcast_i32x4(all);
        let spread = _mm512_shuffle_epi8(all, _mm512_loadu_si512(SPREAD[bits as usize & 15].as_ptr().cast()));
        let each = _mm512_srlv_epi32(spread, _mm512_loadu_si512(SHIFTS[bits as usize & 15].as_ptr().cast()));
        _mm512_and_si512(each, _mm512_set1_epi32((1 << bits) - 1))
    }
}

/// 16 bytes of entries of `WIDTH` numbers of two bytes each, from entry `first` on.
#[inline(always)]
unsafe fn join_16<const WIDTH: usize>(entries: &Entries<u16>, first: usize) -> __m128i {
    // SAFETY: each entry has `WIDTH` numbers; the caller has the instruction set.
    unsafe {
        match WIDTH {
            4 => {
                let low = _mm_load_sd(entries[first].cast());
                _mm_castpd_si128(_mm_loadh_pd(low, entries[first + 1].cast()))
            }
            8 => _mm_loadu_si128(entries[first].cast()),
            _ => {
                let mut numbers = [0; 4];
                for place in 0..4 {
                    numbers[place] = entries[first + place].cast::<i32>().read_unaligned();
                }
                _mm_setr_epi32(numbers[0], numbers[1], numbers[2], numbers[3])
            }
        }
    }
}

/// 32 bytes of entries of `WIDTH` numbers of two bytes each.
#[inline(always)]
unsafe fn join_32<const WIDTH: usize>(entries: &Entries<u16>) -> __m256i {
    // SAFETY: passed on to the caller.
    unsafe { _mm256_setr_m128i(join_16::<WIDTH>(entries, 0), join_16::<WIDTH>(entries, 8 / WIDTH)) }
}

impl Widen for Eight {
    type Half = Eight;
    const REGISTERS: usize = 16;
    #[inline(always)]
    unsafe fn enter(task: impl Task) {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn inside(task: impl Task) {
            // SAFETY: this function has the features of the task's vectors.
            unsafe { task.run() }
        }
        // SAFETY: the caller has the instruction set.
        unsafe { inside(task) }
    }
    operations! {
        fn load_f16(from: *const u16) -> Self = Eight(_mm256_cvtph_ps(_mm_loadu_si128(from.cast())));
        fn load_bf16(from: *const u16) -> Self = {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Eight(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        };
        fn load_i8(from: *const i8) -> Self = {
            Eight(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))))
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
        fn load_bits(row: *const u8, t: usize, bits: u32) -> Self = {
            Eight(_mm256_cvtepi32_ps(eight_fields(row.add(t * bits as usize / 8), bits)))
        };
        fn load_table(row: *const u8, t: usize, bits: u32, table: *const f32) -> Self = {
            let places = eight_fields(row.add(t * bits as usize / 8), bits);
            if bits > 4 {
                return Eight(_mm256_i32gather_ps::<4>(table, places));
            }
            let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), places);
            let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.add(8)), places);
            // The fourth bit of a place becomes the sign that a blend goes by.
            Eight(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(places))))
        };
        fn one_f16(bits: u16) -> f32 = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))));
        fn splat_f16(bits: u16) -> Self = Eight(_mm256_cvtph_ps(_mm_set1_epi16(bits as i16)));
    }
    #[inline(always)]
    unsafe fn join_f16<const WIDTH: usize>(entries: &Entries<u16>) -> Self {
        // SAFETY: passed on to the caller.
        Eight(unsafe { _mm256_cvtph_ps(join_16::<WIDTH>(entries, 0)) })
    }
    #[inline(always)]
    unsafe fn join_bf16<const WIDTH: usize>(entries: &Entries<u16>) -> Self {
        // SAFETY: passed on to the caller.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(join_16::<WIDTH>(entries, 0));
            Eight(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn store_f16<const WAY: u8>(self, to: *mut u16) {
        // SAFETY: the caller has the instruction set and room for a vector.
        unsafe { write_16::<WAY>(to, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_bf16<const WAY: u8>(self, to: *mut u16) {
        // SAFETY: the caller has the instruction set and room for a vector.
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let upper = _mm256_srli_epi32::<16>(bits);
            let even = _mm256_add_epi32(_mm256_and_si256(upper, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, even));
            let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            let all = _mm256_blendv_epi8(rounded, quiet, nan);
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(all, all));
            write_16::<WAY>(to, _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    unsafe fn store_f32<const WAY: u8>(self, to: *mut f32) {
        // SAFETY: the caller has the instruction set, and room, aligned where it is streamed.
        unsafe { write_32::<WAY>(to.cast(), _mm256_castps_si256(self.0)) }
    }
    #[inline(always)]
    fn fence() {
        // SAFETY: every CPU of this architecture has the instruction.
        unsafe { _mm_sfence() }
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

/// For each mask of eight lanes, the lanes that are set, in order.
static SET_LANES: [[u8; 8]; 256] = {
    let mut all = [[0; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut count) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                all[mask][count] = lane as u8;
                count += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    all
};

impl Pack for Eight {
    #[inline(always)]
    unsafe fn places(self, limit: Self, first: u32, to: *mut u32) -> usize {
        // SAFETY: the caller has the instruction set and room for a vector; a mask has eight bits.
        unsafe {
            let mask = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LE_OQ>(self.0, limit.0)) as u32;
            let lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(SET_LANES.as_ptr().add(mask as usize).cast()));
            _mm256_storeu_si256(to.cast(), _mm256_add_epi32(lanes, _mm256_set1_epi32(first as i32)));
            mask.count_ones() as usize
        }
    }
    #[inline(always)]
    fn fetch(address: *const f32) {
        // SAFETY: a prefetch does not fault, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}

impl Pack for Sixteen {
    #[inline(always)]
    unsafe fn places(self, limit: Self, first: u32, to: *mut u32) -> usize {
        // SAFETY: the caller has the instruction set and room for a vector.
        unsafe {
            let mask = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(self.0, limit.0);
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let places = _mm512_add_epi32(lanes, _mm512_set1_epi32(first as i32));
            _mm512_storeu_si512(to.cast(), _mm512_maskz_compress_epi32(mask, places));
            u32::from(mask).count_ones() as usize
        }
    }
    #[inline(always)]
    fn fetch(address: *const f32) {
        // SAFETY: a prefetch does not fault, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}

impl Trace for Eight {
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8) {
        // SAFETY: the caller has the instruction set and room for eight bytes.
        unsafe {
            let lowest = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
            let halves = _mm256_shuffle_epi8(_mm256_castps_si256(self.0), _mm256_broadcastsi128_si256(lowest));
            let (low, high) = (_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
            _mm_storel_epi64(to.cast(), _mm_unpacklo_epi32(low, high));
        }
    }
    #[inline(always)]
    unsafe fn repeat<const K: u32>(from: *const f32) -> Self {
        // SAFETY: the caller has the instruction set and a vector from the place.
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1 >> K, 2 >> K, 3 >> K, 4 >> K, 5 >> K, 6 >> K, 7 >> K);
            Eight(_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), lanes))
        }
    }
}

impl Trace for Sixteen {
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8) {
        // SAFETY: the caller has the instruction set and room for sixteen bytes.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_castps_si512(self.0))) }
    }
    #[inline(always)]
    unsafe fn repeat<const K: u32>(from: *const f32) -> Self {
        // SAFETY: the caller has the instruction set and a vector from the place.
        unsafe {
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            Sixteen(_mm512_permutexvar_ps(_mm512_srli_epi32::<K>(lanes), _mm512_loadu_ps(from)))
        }
    }
}

impl Widen for Sixteen {
    type Half = Eight;
    const REGISTERS: usize = 32;
    #[inline(always)]
    unsafe fn enter(task: impl Task) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
        unsafe fn inside(task: impl Task) {
            // SAFETY: this function has the features of the task's vectors.
            unsafe { task.run() }
        }
        // SAFETY: the caller has the instruction set.
        unsafe { inside(task) }
    }
    operations! {
        fn load_f16(from: *const u16) -> Self = Sixteen(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast())));
        fn load_bf16(from: *const u16) -> Self = {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Sixteen(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        };
        fn load_i8(from: *const i8) -> Self = {
            Sixteen(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))))
        };
        fn load_u8(from: *const u8) -> Self = {
            Sixteen(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))))
        };
        fn load_u4(from: *const u8) -> Self = {
            // Low and high nibbles of each byte side by side.
            let all = _mm_loadl_epi64(from.cast());
            let both = _mm_unpacklo_epi8(all, _mm_srli_epi16::<4>(all));
            let each = _mm512_cvtepu8_epi32(_mm_and_si128(both, _mm_set1_epi8(15)));
            Sixteen(_mm512_cvtepi32_ps(each))
        };
        fn load_u2(from: *const u8) -> Self = {
            let all = _mm512_set1_epi32(from.cast::<i32>().read_unaligned());
            let places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let each = _mm512_and_si512(_mm512_srlv_epi32(all, places), _mm512_set1_epi32(3));
            Sixteen(_mm512_cvtepi32_ps(each))
        };
        fn load_bits(row: *const u8, t: usize, bits: u32) -> Self = {
            Sixteen(_mm512_cvtepi32_ps(sixteen_fields(row.add(t * bits as usize / 8), bits)))
        };
        fn load_table(row: *const u8, t: usize, bits: u32, table: *const f32) -> Self = {
            let places = sixteen_fields(row.add(t * bits as usize / 8), bits);
            match bits {
                0..=4 => Sixteen(_mm512_permutexvar_ps(places, _mm512_loadu_ps(table))),
                5 => {
                    let (low, high) = (_mm512_loadu_ps(table), _mm512_loadu_ps(table.add(16)));
                    Sixteen(_mm512_permutex2var_ps(low, places, high))
                }
                _ => Sixteen(_mm512_i32gather_ps::<4>(places, table)),
            }
        };
        fn one_f16(bits: u16) -> f32 = Eight::one_f16(bits);
        fn splat_f16(bits: u16) -> Self = Sixteen(_mm512_cvtph_ps(_mm256_set1_epi16(bits as i16)));
    }
    #[inline(always)]
    unsafe fn join_f16<const WIDTH: usize>(entries: &Entries<u16>) -> Self {
        // SAFETY: passed on to the caller.
        Sixteen(unsafe { _mm512_cvtph_ps(join_32::<WIDTH>(entries)) })
    }
    #[inline(always)]
    unsafe fn join_bf16<const WIDTH: usize>(entries: &Entries<u16>) -> Self {
        // SAFETY: passed on to the caller.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(join_32::<WIDTH>(entries));
            Sixteen(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn store_f16<const WAY: u8>(self, to: *mut u16) {
        // SAFETY: the caller has the instruction set and room for a vector.
        unsafe { write_32::<WAY>(to, _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_bf16<const WAY: u8>(self, to: *mut u16) {
        // SAFETY: the caller has the instruction set and room for a vector.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let upper = _mm512_srli_epi32::<16>(bits);
            let even = _mm512_add_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, even));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let all = _mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40));
            write_32::<WAY>(to, _mm512_cvtepi32_epi16(all));
        }
    }
    #[inline(always)]
    unsafe fn store_f32<const WAY: u8>(self, to: *mut f32) {
        // SAFETY: the caller has the instruction set, and room, aligned where it is streamed.
        unsafe {
            match WAY {
                CACHE => _mm512_storeu_ps(to, self.0),
                STREAM => _mm512_stream_ps(to, self.0),
                _ => {
                    let halves = _mm512_castps_si512(self.0);
                    write_32::<WAY>(to.cast(), _mm512_castsi512_si256(halves));
                    write_32::<WAY>(to.add(8).cast(), _mm512_extracti64x4_epi64::<1>(halves));
                }
            }
        }
    }
    #[inline(always)]
    fn fence() {
        // SAFETY: every CPU of this architecture has the instruction.
        unsafe { _mm_sfence() }
    }
    #[inline(always)]
    fn prefetch(address: *const u8) {
        Eight::prefetch(address);
    }
}
