//! Rows of small numbers with scales.

use super::rows::{Bf16, Decode, Job, Lookup, Pool, Reader, Source, F16};
use super::{check, scalar, Bags, Level, LevelsView, Meaning, Output, Rows, Scales, Widen};
use std::marker::PhantomData;

/// How a level is read: [`Level`] and [`Meaning`] as a type, so that each has its own loop.
trait LevelType {
    /// Levels are looked up in the view's table: there is no offset.
    const TABLE: bool = false;
    /// Bits of a level.
    fn bits(view: &LevelsView) -> usize;
    /// Reads what `LANES` levels from level `t` of a row on stand for.
    unsafe fn load<S: Widen>(view: &LevelsView, row: *const u8, t: usize) -> S;
}

macro_rules! level_type {
    ($name:ident, $bits:literal, $load:ident) => {
        struct $name;
        impl LevelType for $name {
            #[inline(always)]
            fn bits(_: &LevelsView) -> usize {
                $bits
            }
            #[inline(always)]
            unsafe fn load<S: Widen>(_: &LevelsView, row: *const u8, t: usize) -> S {
                // SAFETY: passed on to the caller.
                unsafe { S::$load(row.add(t * $bits / 8).cast()) }
            }
        }
    };
}

level_type!(ReadF16, 16, load_f16);
level_type!(ReadBf16, 16, load_bf16);
level_type!(ReadU8, 8, load_u8);
level_type!(ReadU4, 4, load_u4);
level_type!(ReadU2, 2, load_u2);

/// Levels of any width.
struct ReadBits;

impl LevelType for ReadBits {
    #[inline(always)]
    fn bits(view: &LevelsView) -> usize {
        view.level.bits() as usize
    }
    #[inline(always)]
    unsafe fn load<S: Widen>(view: &LevelsView, row: *const u8, t: usize) -> S {
        // SAFETY: passed on to the caller.
        unsafe { S::load_bits(row, t, view.level.bits()) }
    }
}

/// Entries of a table, by levels of any width.
struct ReadTable;

impl LevelType for ReadTable {
    const TABLE: bool = true;
    #[inline(always)]
    fn bits(view: &LevelsView) -> usize {
        view.level.bits() as usize
    }
    #[inline(always)]
    unsafe fn load<S: Widen>(view: &LevelsView, row: *const u8, t: usize) -> S {
        let Meaning::Table(table) = view.meaning else { unreachable!() };
        // SAFETY: passed on to the caller; the table has an entry for every level, and whole vectors.
        unsafe { S::load_table(row, t, view.level.bits(), table.as_ptr()) }
    }
}

#[inline(always)]
pub(in crate::kernels) unsafe fn lookup_levels<S: Widen>(view: &LevelsView, rows: &Rows, out: Output) {
    check::levels(view, rows, &out);
    // SAFETY: the view was checked; the instruction set is the caller's.
    unsafe {
        match out {
            Output::F32(out) => run::<S>(view, Lookup::<f32> { rows, out }),
            Output::F16(out) => run::<S>(view, Lookup::<F16> { rows, out }),
            Output::Bf16(out) => run::<S>(view, Lookup::<Bf16> { rows, out }),
        }
    }
}

#[inline(always)]
pub(in crate::kernels) unsafe fn pool_levels<S: Widen>(view: &LevelsView, bags: &Bags, out: &mut [f32]) {
    check::pool_levels(view, bags, out);
    // SAFETY: the view was checked; the instruction set is the caller's.
    unsafe { run::<S>(view, Pool { bags, out }) }
}

#[inline(always)]
unsafe fn run<S: Widen>(view: &LevelsView, job: impl Job) {
    // SAFETY: passed on to the caller.
    unsafe {
        match view.meaning {
            Meaning::Number => {}
            Meaning::Table(_) => return run_levels::<S, ReadTable>(view, job),
            Meaning::Own => return job.rows::<S>(&Own(view), view.dim),
        }
        match view.level {
            Level::F16 => run_floats::<S, ReadF16>(view, job),
            Level::Bf16 => run_floats::<S, ReadBf16>(view, job),
            Level::U8 => run_levels::<S, ReadU8>(view, job),
            Level::U4 => run_levels::<S, ReadU4>(view, job),
            Level::U2 => run_levels::<S, ReadU2>(view, job),
            Level::Bits(_) => run_levels::<S, ReadBits>(view, job),
        }
    }
}

#[inline(always)]
unsafe fn run_floats<S: Widen, L: LevelType>(view: &LevelsView, job: impl Job) {
    let plain = matches!(view.scales, Scales::None);
    // SAFETY: passed on to the caller.
    unsafe {
        match plain && view.dim >= S::LANES {
            true => job.run::<S>(&Vectors::<L, PLAIN>::new(view), view.row_bytes, view.dim),
            false => job.rows::<S>(&Spans::<S, L> { view, types: PhantomData }, view.dim),
        }
    }
}

#[inline(always)]
unsafe fn run_levels<S: Widen, L: LevelType>(view: &LevelsView, job: impl Job) {
    // Each vector starts on a whole byte and has its scales in one place.
    let (dim, whole) = (view.dim, view.dim.is_multiple_of(S::LANES));
    let bytes = dim >= S::LANES && (whole || (dim * L::bits(view)).is_multiple_of(8));
    // SAFETY: passed on to the caller.
    unsafe {
        match view.scales {
            Scales::Columns { .. } if bytes => job.run::<S>(&Vectors::<L, COLUMNS>::new(view), view.row_bytes, dim),
            Scales::Row { block, .. } if bytes && block >= dim => {
                job.run::<S>(&Vectors::<L, ROW>::new(view), view.row_bytes, dim)
            }
            Scales::Row { block, .. } if bytes && whole && block.is_multiple_of(S::LANES) => {
                job.run::<S>(&Vectors::<L, BLOCKS>::new(view), view.row_bytes, dim)
            }
            _ => job.rows::<S>(&Spans::<S, L> { view, types: PhantomData }, dim),
        }
    }
}

const PLAIN: u8 = 0;
const COLUMNS: u8 = 1;
const ROW: u8 = 2;
const BLOCKS: u8 = 3;

/// Rows of whole vectors of levels; `SCALES` is one of the constants above.
struct Vectors<'a, L, const SCALES: u8> {
    view: &'a LevelsView<'a>,
    pairs: Pairs,
    /// Scale and offset of each column, if they have them.
    columns: (*const f32, *const f32),
    level: PhantomData<L>,
}

impl<L, const SCALES: u8> Clone for Vectors<'_, L, SCALES> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<L, const SCALES: u8> Copy for Vectors<'_, L, SCALES> {}

impl<'a, L: LevelType, const SCALES: u8> Vectors<'a, L, SCALES> {
    fn new(view: &'a LevelsView) -> Self {
        let columns = match view.scales {
            Scales::Columns { scale, offset } => (scale.as_ptr(), offset.as_ptr()),
            _ => (std::ptr::null(), std::ptr::null()),
        };
        Vectors { view, pairs: Pairs::new::<L>(view), columns, level: PhantomData }
    }
}

impl<S: Widen, L: LevelType, const SCALES: u8> Reader<S> for Vectors<'_, L, SCALES> {
    #[inline(always)]
    unsafe fn read<const N: usize>(&self, code: *const u8, vector: usize, dim: usize) -> [S; N] {
        let start = <Self as Reader<S>>::column::<N>(self, vector, dim);
        // SAFETY: the row has `dim` levels and its pairs; each vector's levels start on a whole byte. Columns have what
        // `SCALES` says.
        unsafe {
            let mut shared = (S::splat(1.0), S::splat(0.0));
            if SCALES == ROW {
                shared = self.pairs.read::<S>(code, 0);
            }
            let mut values = [S::splat(0.0); N];
            for i in 0..N {
                let t = start + i * S::LANES;
                let level = L::load::<S>(self.view, code, t);
                values[i] = match SCALES {
                    COLUMNS if L::TABLE => level.mul(S::load(self.columns.0.add(t))),
                    COLUMNS => level.fma(S::load(self.columns.0.add(t)), S::load(self.columns.1.add(t))),
                    BLOCKS => {
                        let (scale, offset) = self.pairs.read::<S>(code, t / self.pairs.block);
                        if L::TABLE {
                            level.mul(scale)
                        } else {
                            level.fma(scale, offset)
                        }
                    }
                    ROW if L::TABLE => level.mul(shared.0),
                    ROW => level.fma(shared.0, shared.1),
                    _ => level,
                };
            }
            values
        }
    }
}

/// The pairs inside rows, as [`scalar::pair_at`] has them but with the CPU's own conversion.
#[derive(Clone, Copy)]
struct Pairs {
    /// Where they start in a row.
    start: usize,
    /// Columns that share one.
    block: usize,
    symmetric: bool,
    narrow: bool,
    scale_factor: f32,
    /// What the stored offset is multiplied by; with `symmetric` what the scale is.
    offset_factor: f32,
}

impl Pairs {
    /// Those of a view; of no use where it has none.
    fn new<L: LevelType>(view: &LevelsView) -> Self {
        let start = view.level_bytes();
        match view.scales {
            Scales::Row { block, symmetric, narrow, scale_factor, offset_factor } => {
                let middle = -((1u32 << (L::bits(view) - 1)) as f32);
                let offset_factor = if symmetric { middle } else { offset_factor };
                Pairs { start, block, symmetric, narrow, scale_factor, offset_factor }
            }
            _ => Pairs { start, block: 1, symmetric: true, narrow: false, scale_factor: 1.0, offset_factor: 0.0 },
        }
    }

    /// Scale and offset of a block.
    #[inline(always)]
    unsafe fn read<S: Widen>(&self, row: *const u8, index: usize) -> (S, S) {
        // SAFETY: the row has a pair for each block; the instruction set is the caller's.
        unsafe {
            let pairs = row.add(self.start);
            let number = |at: usize| S::splat_f16(u16::from_le(pairs.add(2 * at).cast::<u16>().read_unaligned()));
            let (scale_factor, offset_factor) = (S::splat(self.scale_factor), S::splat(self.offset_factor));
            if self.symmetric {
                let scale = if self.narrow { S::splat_f16(u16::from(*pairs.add(index)) << 6) } else { number(index) };
                let scale = scale.mul(scale_factor);
                (scale, scale.mul(offset_factor))
            } else {
                (number(2 * index).mul(scale_factor), number(2 * index + 1).mul(offset_factor))
            }
        }
    }
}

/// Rows that have levels of their own: the plain loop.
struct Own<'a>(&'a LevelsView<'a>);

impl Decode for Own<'_> {
    #[inline(always)]
    unsafe fn decode(&self, rows: &Rows, out: &mut [f32]) {
        scalar::decode_levels(self.0, rows, out);
    }
}

/// Rows of any width and blocks of any size: a vector at a time and the rest one by one.
struct Spans<'a, S, L> {
    view: &'a LevelsView<'a>,
    types: PhantomData<(S, L)>,
}

impl<S: Widen, L: LevelType> Decode for Spans<'_, S, L> {
    #[inline(always)]
    unsafe fn decode(&self, rows: &Rows, out: &mut [f32]) {
        let view = self.view;
        let (dim, bits, all) = (view.dim, L::bits(view), Pairs::new::<L>(view));
        if let Scales::Row { block, .. } = view.scales {
            // Vectors start on whole bytes; blocks that do not are rare enough for the plain loop.
            if block < dim && !(block * bits).is_multiple_of(8) {
                return scalar::decode_levels(view, rows, out);
            }
        }
        let mut out = out.chunks_exact_mut(dim);
        let mut source = Source::new::<S>(rows, view.row_bytes);
        while let Some(row) = source.next::<S>() {
            let Some(out) = out.next() else { break };
            // SAFETY: a row of the source has `row_bytes` bytes.
            let code = unsafe { std::slice::from_raw_parts(row, view.row_bytes) };
            // SAFETY: the row has `dim` levels, whole blocks of which start on whole bytes, and a pair for each block.
            unsafe {
                match view.scales {
                    Scales::None => {
                        span::<S, L>(view, row, 0, out, |_| (S::splat(1.0), S::splat(-0.0)));
                        rest::<S>(view, code, 0, out, |_| (1.0, -0.0));
                    }
                    Scales::Columns { scale, .. } if L::TABLE => {
                        span::<S, L>(view, row, 0, out, |t| (S::load(scale.as_ptr().add(t)), S::splat(0.0)));
                        rest::<S>(view, code, 0, out, |t| (scale[t], 0.0));
                    }
                    Scales::Columns { scale, offset } => {
                        let load = |t| (S::load(scale.as_ptr().add(t)), S::load(offset.as_ptr().add(t)));
                        span::<S, L>(view, row, 0, out, load);
                        rest::<S>(view, code, 0, out, |t| (scale[t], offset[t]));
                    }
                    Scales::Row { block, .. } => {
                        let pairs = &code[all.start..];
                        for (index, out) in out.chunks_mut(block).enumerate() {
                            let shared = all.read::<S>(row, index);
                            span::<S, L>(view, row, index * block, out, |_| shared);
                            let alone = scalar::pair_at(view, pairs, index);
                            rest::<S>(view, code, index * block, out, |_| alone);
                        }
                    }
                }
            }
        }
    }
}

/// What is left of `out.len()` levels after whole vectors.
fn whole<S: Widen>(out: &[f32]) -> usize {
    out.len() - out.len() % S::LANES
}

/// `out.len()` levels from level `start` of a row on, those in whole vectors; `start` is on a whole byte.
#[inline(always)]
unsafe fn span<S: Widen, L: LevelType>(
    view: &LevelsView,
    row: *const u8,
    start: usize,
    out: &mut [f32],
    scales: impl Fn(usize) -> (S, S),
) {
    for t in (0..whole::<S>(out)).step_by(S::LANES) {
        // SAFETY: the row holds all levels of `out`; a multiple of the lanes is whole bytes, or the load takes care of it.
        unsafe {
            let level = L::load::<S>(view, row, start + t);
            let (scale, offset) = scales(t);
            let value = match (L::TABLE, view.scales) {
                (_, Scales::None) => level,
                (true, _) => level.mul(scale),
                (false, _) => level.fma(scale, offset),
            };
            value.store(out.as_mut_ptr().add(t));
        }
    }
}

/// The levels that [`span`] left out, one by one.
#[inline(always)]
fn rest<S: Widen>(view: &LevelsView, code: &[u8], start: usize, out: &mut [f32], scales: impl Fn(usize) -> (f32, f32)) {
    for t in whole::<S>(out)..out.len() {
        let entry = scalar::entry_at(view, code, start + t);
        let (scale, offset) = scales(t);
        out[t] = match (view.meaning, view.scales) {
            (_, Scales::None) => entry,
            (Meaning::Table(_), _) => entry * scale,
            _ => entry.mul_add(scale, offset),
        };
    }
}
