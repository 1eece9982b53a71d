//! Rows of small numbers with scales.

use super::{check, row_codes, scalar, Ids, Level, LevelsView, Scales, Simd, Widen};

/// How a level is read: [`Level`] as a type, so that each has its own loop.
trait Reader {
    const LEVEL: Level;
    /// Reads `LANES` levels.
    unsafe fn load<S: Widen>(from: *const u8) -> S;
}

macro_rules! reader {
    ($name:ident, $level:ident, $load:ident) => {
        struct $name;
        impl Reader for $name {
            const LEVEL: Level = Level::$level;
            #[inline(always)]
            unsafe fn load<S: Widen>(from: *const u8) -> S {
                // SAFETY: passed on to the caller.
                unsafe { S::$load(from.cast()) }
            }
        }
    };
}

reader!(ReadF16, F16, load_f16);
reader!(ReadBf16, Bf16, load_bf16);
reader!(ReadU8, U8, load_u8);
reader!(ReadU4, U4, load_u4);
reader!(ReadU2, U2, load_u2);

#[inline(always)]
pub(in crate::kernels) unsafe fn lookup_levels<S: Widen>(view: &LevelsView, codes: &[u8], ids: Ids, out: &mut [f32]) {
    check::levels(view, &ids, out);
    if let Scales::Row { block, .. } = view.scales {
        // Vectors start on whole bytes; blocks that do not are rare enough for the plain loop.
        if block < view.dim && !(block * view.level.bits() as usize).is_multiple_of(8) {
            return scalar::lookup_levels(view, codes, ids, out);
        }
    }
    // SAFETY: the view was checked; the instruction set is the caller's.
    unsafe {
        match view.level {
            Level::F16 => levels::<S, ReadF16>(view, codes, ids, out),
            Level::Bf16 => levels::<S, ReadBf16>(view, codes, ids, out),
            Level::U8 => levels::<S, ReadU8>(view, codes, ids, out),
            Level::U4 => levels::<S, ReadU4>(view, codes, ids, out),
            Level::U2 => levels::<S, ReadU2>(view, codes, ids, out),
        }
    }
}

#[inline(always)]
unsafe fn levels<S: Widen, R: Reader>(view: &LevelsView, codes: &[u8], ids: Ids, out: &mut [f32]) {
    let level_bytes = view.level_bytes();
    for (position, out) in out.chunks_exact_mut(view.dim).enumerate() {
        let code = row_codes::<S>(codes, view.row_bytes, &ids, position);
        // SAFETY: the row has `dim` levels, whole blocks of which start on whole bytes, and a pair for each block.
        unsafe {
            match view.scales {
                Scales::None => span::<S, R>(code, out, Plain),
                Scales::Columns { scale, offset } => span::<S, R>(code, out, PerColumn { scale, offset }),
                Scales::Row { block, .. } => {
                    let block_bytes = block * R::LEVEL.bits() as usize / 8;
                    for (index, out) in out.chunks_mut(block).enumerate() {
                        let (scale, offset) = pair::<S, R>(view, &code[level_bytes..], index);
                        span::<S, R>(&code[index * block_bytes..], out, Shared { scale, offset });
                    }
                }
            }
        }
    }
}

/// Scale and offset of a block, as [`scalar::pair_at`] has it but with the CPU's own conversion.
#[inline(always)]
unsafe fn pair<S: Widen, R: Reader>(view: &LevelsView, pairs: &[u8], index: usize) -> (f32, f32) {
    let Scales::Row { symmetric, scale_factor, offset_factor, .. } = view.scales else { unreachable!() };
    // SAFETY: the instruction set is the caller's.
    unsafe {
        if symmetric {
            let scale = S::one_f16(scalar::half_at(pairs, index)) * scale_factor;
            (scale, -scale * (1u32 << (R::LEVEL.bits() - 1)) as f32)
        } else {
            let scale = S::one_f16(scalar::half_at(pairs, 2 * index)) * scale_factor;
            (scale, S::one_f16(scalar::half_at(pairs, 2 * index + 1)) * offset_factor)
        }
    }
}

/// What makes a value of a level.
trait Affine {
    unsafe fn vector<S: Simd>(&self, level: S, t: usize) -> S;
    fn one(&self, level: f32, t: usize) -> f32;
}

struct Plain;

struct PerColumn<'a> {
    scale: &'a [f32],
    offset: &'a [f32],
}

struct Shared {
    scale: f32,
    offset: f32,
}

impl Affine for Plain {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, level: S, _: usize) -> S {
        level
    }
    #[inline(always)]
    fn one(&self, level: f32, _: usize) -> f32 {
        level
    }
}

impl Affine for PerColumn<'_> {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, level: S, t: usize) -> S {
        // SAFETY: scales and offsets have a value for each column, and a vector from `t` stays inside the columns.
        unsafe { level.fma(S::load(self.scale.as_ptr().add(t)), S::load(self.offset.as_ptr().add(t))) }
    }
    #[inline(always)]
    fn one(&self, level: f32, t: usize) -> f32 {
        level.mul_add(self.scale[t], self.offset[t])
    }
}

impl Affine for Shared {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, level: S, _: usize) -> S {
        // SAFETY: the instruction set is the caller's.
        unsafe { level.fma(S::splat(self.scale), S::splat(self.offset)) }
    }
    #[inline(always)]
    fn one(&self, level: f32, _: usize) -> f32 {
        level.mul_add(self.scale, self.offset)
    }
}

/// `out.len()` levels from the start of `code`.
#[inline(always)]
unsafe fn span<S: Widen, R: Reader>(code: &[u8], out: &mut [f32], affine: impl Affine) {
    let whole = out.len() - out.len() % S::LANES;
    for t in (0..whole).step_by(S::LANES) {
        // SAFETY: `code` holds all levels of `out`; a multiple of the lanes (4 at least, of 2 bits) is whole bytes.
        unsafe {
            let level = R::load::<S>(code.as_ptr().add(t * R::LEVEL.bits() as usize / 8));
            affine.vector(level, t).store(out.as_mut_ptr().add(t));
        }
    }
    for t in whole..out.len() {
        out[t] = affine.one(scalar::level_at(R::LEVEL, code, t), t);
    }
}
