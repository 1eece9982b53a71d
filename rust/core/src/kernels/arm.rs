//! NEON: the vector operations, and safe functions around the bodies. Every aarch64 CPU has NEON, so that nothing needs
//! to be switched on.

use super::scalar;
use super::simd::{self, Pack, Simd, Task, Trace, Widen};
use super::{
    Bags, BooksView, Descent, Extension, Kernels, LevelsView, Output, Panels, Products, Rows, Sweep, TrellisView,
};
use std::arch::aarch64::*;

/// The tables that this CPU can run.
pub(super) fn available() -> Vec<&'static Kernels> {
    vec![&NEON]
}

/// 24 sums of 32 registers.
static NEON: Kernels = Kernels {
    name: "neon",
    panel_rows: 4,
    block_centers: 6,
    panel_centers: 16,
    lookup_books,
    lookup_levels,
    pool_books,
    pool_levels,
    pack: scalar::pack::<4>,
    nearest,
    sift: None,
    dots,
    distances,
    extend,
    decode_trellis,
    sweep,
    hadamard: scalar::hadamard,
    descend,
    quantize: scalar::quantize,
    grid_error: scalar::grid_error,
    axpy,
    to_f16,
    to_bf16,
    carries: scalar::carries,
    fma_peak,
};

macro_rules! shell {
    (fn $name:ident($($argument:ident: $type:ty),*) $(-> $out:ty)? = $body:expr) => {
        fn $name($($argument: $type),*) $(-> $out)? {
            // SAFETY: NEON is part of aarch64.
            unsafe { $body($($argument),*) }
        }
    };
}

shell!(fn lookup_books(view: &BooksView, rows: &Rows, out: Output) = simd::lookup_books::<Four>);
shell!(fn lookup_levels(view: &LevelsView, rows: &Rows, out: Output) = simd::lookup_levels::<Four>);
shell!(fn pool_books(view: &BooksView, bags: &Bags, out: &mut [f32]) = simd::pool_books::<Four>);
shell!(fn pool_levels(view: &LevelsView, bags: &Bags, out: &mut [f32]) = simd::pool_levels::<Four>);
shell!(fn nearest(task: &Panels, labels: &mut [u32], best: &mut [f32], second: &mut [f32])
    = simd::nearest::<Four, 4, 6, 4, 2>);
shell!(fn dots(task: &Products, out: &mut [f32]) = simd::products::<Four, 4, 6, false>);
shell!(fn distances(task: &Products, out: &mut [f32]) = simd::products::<Four, 4, 4, true>);
shell!(fn extend(task: &Extension, scores: &mut [f32], paths: &mut [u16]) = simd::extend::<Four, 8, 4>);
shell!(fn decode_trellis(view: &TrellisView, rows: &Rows, out: &mut [f32]) = simd::decode_trellis::<Four>);
shell!(fn sweep(task: &Sweep, costs: &mut [f32], least: &mut [f32], back: &mut [u8]) = simd::sweep::<Four>);
shell!(fn descend(task: &Descent, codes: &mut [u16], scores: &mut [f32]) = simd::descend::<Four, 4>);
shell!(fn axpy(out: &mut [f32], x: &[f32], weight: f32) = simd::axpy::<Four>);
shell!(fn fma_peak(rounds: usize) -> f32 = simd::fma_peak::<Four, 24>);
shell!(fn to_f16(x: &[f32], out: &mut [u16]) = simd::to_f16::<Four>);
shell!(fn to_bf16(x: &[f32], out: &mut [u16]) = simd::to_bf16::<Four>);

/// Four numbers in a NEON register.
#[derive(Clone, Copy)]
struct Four(float32x4_t);

impl Four {
    /// Four integers as numbers.
    #[inline(always)]
    fn of_integers(integers: [u32; 4]) -> Self {
        // SAFETY: NEON is part of aarch64, and the array holds a vector.
        Four(unsafe { vcvtq_f32_u32(vld1q_u32(integers.as_ptr())) })
    }
}

/// Operations that are one expression.
macro_rules! operations {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $out:ty = $body:expr;)*) => {
        $(#[inline(always)]
        unsafe fn $name($($argument: $type),*) -> $out {
            // SAFETY: NEON is part of aarch64; the caller's pointers have all numbers that are read.
            unsafe { $body }
        })*
    };
}

impl Simd for Four {
    const LANES: usize = 4;
    operations! {
        fn splat(value: f32) -> Self = Four(vdupq_n_f32(value));
        fn load(from: *const f32) -> Self = Four(vld1q_f32(from));
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller has room for a vector.
        unsafe { vst1q_f32(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: NEON is part of aarch64.
        Four(unsafe { vaddq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: NEON is part of aarch64.
        Four(unsafe { vsubq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: NEON is part of aarch64.
        Four(unsafe { vmulq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, sum: Self) -> Self {
        // SAFETY: NEON is part of aarch64. The sum comes first.
        Four(unsafe { vfmaq_f32(sum.0, self.0, factor.0) })
    }
    #[inline(always)]
    unsafe fn fnma(self, factor: Self, sum: Self) -> Self {
        // SAFETY: NEON is part of aarch64. The sum comes first.
        Four(unsafe { vfmsq_f32(sum.0, self.0, factor.0) })
    }
    #[inline(always)]
    unsafe fn less(self, other: Self, yes: Self, no: Self) -> Self {
        // SAFETY: NEON is part of aarch64. A selection takes its second operand where the mask is set.
        Four(unsafe { vbslq_f32(vcltq_f32(self.0, other.0), yes.0, no.0) })
    }
}

/// Four integers of `bits` bits from number `t` of a row on. Reads eight bytes.
#[inline(always)]
unsafe fn fields(row: *const u8, t: usize, bits: u32) -> [u32; 4] {
    let start = t * bits as usize;
    // SAFETY: the caller has the bytes.
    let word = u64::from_le(unsafe { row.add(start / 8).cast::<u64>().read_unaligned() }) >> (start % 8);
    [0, 1, 2, 3].map(|place| (word >> (place * bits)) as u32 & ((1 << bits) - 1))
}

impl Widen for Four {
    type Half = Four;
    const REGISTERS: usize = 32;
    operations! {
        fn load_f16(from: *const u16) -> Self = {
            let halves = from.cast::<[half::f16; 4]>().read_unaligned();
            Self::load(halves.map(half::f16::to_f32).as_ptr())
        };
        fn load_bf16(from: *const u16) -> Self = {
            let wide = vmovl_u16(vld1_u16(from));
            Four(vreinterpretq_f32_u32(vshlq_n_u32::<16>(wide)))
        };
        fn load_i8(from: *const i8) -> Self = Self::load(from.cast::<[i8; 4]>().read_unaligned().map(f32::from).as_ptr());
        fn load_u8(from: *const u8) -> Self = Self::of_integers(from.cast::<[u8; 4]>().read_unaligned().map(u32::from));
        fn load_u4(from: *const u8) -> Self = {
            let all = u32::from(from.cast::<u16>().read_unaligned());
            Self::of_integers([all & 15, all >> 4 & 15, all >> 8 & 15, all >> 12])
        };
        fn load_u2(from: *const u8) -> Self = {
            let all = u32::from(*from);
            Self::of_integers([all & 3, all >> 2 & 3, all >> 4 & 3, all >> 6])
        };
        fn load_bits(row: *const u8, t: usize, bits: u32) -> Self = Self::of_integers(fields(row, t, bits));
        fn load_table(row: *const u8, t: usize, bits: u32, table: *const f32) -> Self = {
            Self::load(fields(row, t, bits).map(|place| *table.add(place as usize)).as_ptr())
        };
    }
    #[inline(always)]
    unsafe fn store_f16<const WAY: u8>(self, to: *mut u16) {
        let mut values = [0.0; 4];
        // SAFETY: the array holds a vector; the caller has room for one.
        unsafe {
            self.store(values.as_mut_ptr());
            to.cast::<[half::f16; 4]>().write_unaligned(values.map(half::f16::from_f32));
        }
    }
    #[inline(always)]
    unsafe fn store_bf16<const WAY: u8>(self, to: *mut u16) {
        let mut values = [0.0; 4];
        // SAFETY: the array holds a vector; the caller has room for one.
        unsafe {
            self.store(values.as_mut_ptr());
            to.cast::<[half::bf16; 4]>().write_unaligned(values.map(half::bf16::from_f32));
        }
    }
    #[inline(always)]
    unsafe fn one_f16(bits: u16) -> f32 {
        half::f16::from_bits(bits).to_f32()
    }
    #[inline(always)]
    unsafe fn store_f32<const WAY: u8>(self, to: *mut f32) {
        // SAFETY: passed on to the caller.
        unsafe { self.store(to) }
    }
    #[inline(always)]
    unsafe fn enter(task: impl Task) {
        // SAFETY: passed on to the caller.
        unsafe { task.run() }
    }
    #[inline(always)]
    fn fence() {}
    #[inline(always)]
    fn prefetch(_: *const u8) {}
}

impl Trace for Four {
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8) {
        let mut lanes = [0.0; 4];
        // SAFETY: the array holds a vector; the caller has room for four bytes.
        unsafe {
            self.store(lanes.as_mut_ptr());
            to.cast::<[u8; 4]>().write_unaligned(lanes.map(|lane: f32| lane.to_bits() as u8));
        }
    }
    #[inline(always)]
    unsafe fn repeat<const K: u32>(from: *const f32) -> Self {
        // SAFETY: the caller has a vector from the place.
        unsafe {
            let numbers = vld1q_f32(from);
            Four(if K == 0 { numbers } else { vzip1q_f32(numbers, numbers) })
        }
    }
}

impl Pack for Four {
    #[inline(always)]
    unsafe fn places(self, limit: Self, first: u32, to: *mut u32) -> usize {
        let (mut values, mut limits) = ([0f32; 4], [0f32; 4]);
        let mut count = 0;
        // SAFETY: the arrays hold a vector, and the caller has room for one.
        unsafe {
            self.store(values.as_mut_ptr());
            limit.store(limits.as_mut_ptr());
            for lane in 0..4 {
                *to.add(count) = first + lane as u32;
                count += usize::from(values[lane] <= limits[lane]);
            }
        }
        count
    }
    #[inline(always)]
    fn fetch(_: *const f32) {}
}
