//! One generic body per kernel, over a small trait of vector operations.
//!
//! The bodies are inlined into functions that switch an instruction set on for the whole loop; every body and every
//! operation is `inline(always)`, because a call across that border would pass vectors through memory.
//!
//! # Safety
//!
//! All functions here need the instruction set of their vector type. Each body checks its preconditions first (see
//! [`super::check`]); these and the sliced row of codes keep its pointers inside their slices.

mod beam;
mod books;
mod descent;
mod levels;
mod nearest;
mod peak;
mod products;
mod rows;
mod trellis;
mod vectors;

pub(super) use beam::{extend, Pack};
pub(super) use books::{lookup_books, pool_books};
pub(super) use descent::descend;
pub(super) use levels::{lookup_levels, pool_levels};
pub(super) use nearest::nearest;
#[cfg(target_arch = "x86_64")]
pub(super) use nearest::Ahead;
pub(super) use peak::fma_peak;
pub(super) use products::products;
pub(super) use trellis::{decode_trellis, sweep, Trace};
pub(super) use vectors::{axpy, to_bf16, to_f16};

use super::{
    check, scalar, Bags, BooksView, Descent, Extension, Ids, Level, LevelsView, Meaning, Output, Panels, Products,
    Rows, Scales, Values,
};

/// A loop that is compiled for an instruction set: see [`Widen::enter`].
pub(in crate::kernels) trait Task {
    /// Runs the loop.
    unsafe fn run(self);
}

/// A vector of `f32`.
pub(in crate::kernels) trait Simd: Copy {
    /// Numbers in a vector.
    const LANES: usize;
    /// The same number in all lanes.
    unsafe fn splat(value: f32) -> Self;
    /// Reads `LANES` numbers, aligned or not.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes `LANES` numbers, aligned or not.
    unsafe fn store(self, to: *mut f32);
    /// self + other.
    unsafe fn add(self, other: Self) -> Self;
    /// self - other.
    unsafe fn sub(self, other: Self) -> Self;
    /// self * other.
    unsafe fn mul(self, other: Self) -> Self;
    /// self * factor + sum, rounded once.
    unsafe fn fma(self, factor: Self, sum: Self) -> Self;
    /// sum - self * factor, rounded once.
    unsafe fn fnma(self, factor: Self, sum: Self) -> Self;
    /// self < other ? yes : no, lane by lane.
    unsafe fn less(self, other: Self, yes: Self, no: Self) -> Self;
    /// self < other ? self : other.
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe { self.less(other, self, other) }
    }
    /// self > other ? self : other.
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe { other.less(self, self, other) }
    }
}

/// Where the entries of a vector are that stand side by side: as many as it has of them. No closure says it, because
/// those may be left out of the function that has the instruction set.
pub(in crate::kernels) type Entries<T> = [*const T; 8];

/// Up to 64 bytes of entries side by side, `lanes` numbers in all.
#[inline(always)]
unsafe fn joined<T, const WIDTH: usize>(lanes: usize, entries: &Entries<T>) -> [u64; 8] {
    let bytes = WIDTH * size_of::<T>();
    let mut words = [0u64; 8];
    // SAFETY: each entry has `WIDTH` numbers.
    unsafe {
        for place in 0..lanes / WIDTH {
            let (from, at) = (entries[place], place * bytes);
            if bytes == 2 {
                words[at / 8] |= u64::from(from.cast::<u16>().read_unaligned()) << (at % 8 * 8);
            } else if bytes == 4 {
                words[at / 8] |= u64::from(from.cast::<u32>().read_unaligned()) << (at % 8 * 8);
            } else {
                for word in 0..bytes / 8 {
                    words[at / 8 + word] = from.cast::<u64>().add(word).read_unaligned();
                }
            }
        }
    }
    words
}

/// Ways of writing a vector: into the caches, to any address.
pub(in crate::kernels) const CACHE: u8 = 0;
/// Past the caches, to an address on a multiple of the vector's bytes.
pub(in crate::kernels) const STREAM: u8 = 1;
/// Past the caches, to an address on a multiple of 16 bytes: that of arrays of NumPy.
pub(in crate::kernels) const STREAM_16: u8 = 2;

/// Vectors that read narrower numbers: what lookups need. Pointers may be unaligned.
pub(in crate::kernels) trait Widen: Simd {
    /// Vectors of half as many lanes, for what is too narrow for these; the narrowest vectors are their own.
    type Half: Widen;
    /// Vector registers.
    const REGISTERS: usize;
    /// Runs a task in a function of its own with the instruction set switched on, so that it has all registers to itself.
    unsafe fn enter(task: impl Task);
    /// Reads `LANES` numbers of half precision.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Reads `LANES` numbers of bfloat16.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// As [`Widen::load_f16`], from entries of `WIDTH` numbers each: 2, 4 or 8, and fewer than `LANES`.
    #[inline(always)]
    unsafe fn join_f16<const WIDTH: usize>(entries: &Entries<u16>) -> Self {
        // SAFETY: passed on to the caller.
        unsafe { Self::load_f16(joined::<u16, WIDTH>(Self::LANES, entries).as_ptr().cast()) }
    }
    /// As [`Widen::load_bf16`], from entries of `WIDTH` numbers each: 2, 4 or 8, and fewer than `LANES`.
    #[inline(always)]
    unsafe fn join_bf16<const WIDTH: usize>(entries: &Entries<u16>) -> Self {
        // SAFETY: passed on to the caller.
        unsafe { Self::load_bf16(joined::<u16, WIDTH>(Self::LANES, entries).as_ptr().cast()) }
    }
    /// Reads `LANES` bytes with signs.
    unsafe fn load_i8(from: *const i8) -> Self;
    /// Reads `LANES` bytes.
    unsafe fn load_u8(from: *const u8) -> Self;
    /// Reads `LANES` nibbles, low bits first.
    unsafe fn load_u4(from: *const u8) -> Self;
    /// Reads `LANES` pairs of bits, low bits first.
    unsafe fn load_u2(from: *const u8) -> Self;
    /// Reads `LANES` integers of `bits` bits (1 to 8) from number `t` of a row on, low bits first. `t * bits` is a multiple of
    /// 8 where `LANES` is.
    unsafe fn load_bits(row: *const u8, t: usize, bits: u32) -> Self;
    /// As [`Widen::load_bits`], then the entries of a table that they pick. The table has 2^bits entries and at least 16.
    unsafe fn load_table(row: *const u8, t: usize, bits: u32, table: *const f32) -> Self;
    /// Writes `LANES` numbers in one of the ways below.
    unsafe fn store_f32<const WAY: u8>(self, to: *mut f32);
    /// Rounds to half precision, to nearest even, and writes `LANES` of them in one of the ways below.
    unsafe fn store_f16<const WAY: u8>(self, to: *mut u16);
    /// Rounds to bfloat16, to nearest even, and writes `LANES` of them in one of the ways below.
    unsafe fn store_bf16<const WAY: u8>(self, to: *mut u16);
    /// Makes what was streamed visible to other threads before what is written later.
    fn fence();
    /// One number of half precision.
    unsafe fn one_f16(bits: u16) -> f32;
    /// One number of half precision in all lanes.
    #[inline(always)]
    unsafe fn splat_f16(bits: u16) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe { Self::splat(Self::one_f16(bits)) }
    }
    /// Asks for a cache line. Any address is fine.
    fn prefetch(address: *const u8);
}
