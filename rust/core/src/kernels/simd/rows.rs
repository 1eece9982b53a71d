//! The loops over rows that all decoders share: a lookup stores each row, a pool adds it to others in registers.

use super::{scalar, to_bf16, to_f16, Ids, Task, Widen, CACHE, STREAM, STREAM_16};
use crate::kernels::{Bags, Rows, ROUNDED};
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes behind a row that a reader may read along with it.
pub(super) const SPARE: usize = 8;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Rows of a block. A block is asked for while the one before it is read: early enough, and not so early that it is gone
/// again.
const BLOCK: usize = 64;

/// Finds the codes of rows, a block at a time, and asks for the block that follows.
pub(super) struct Source<'a> {
    codes: &'a [u8],
    ids: Ids<'a>,
    row_bytes: usize,
    /// Rows below this one have [`SPARE`] bytes behind them.
    inner: usize,
    /// A copy of the other rows, once one is read.
    copy: Vec<u8>,
    /// From a row's first byte to the last of its bytes a line apart: one in each line but perhaps the last.
    spread: usize,
    /// The last byte of a row may stand in one line more.
    beyond: bool,
    /// Position behind the block.
    position: usize,
    end: usize,
    /// Rows of the block, and how many of them [`Source::next`] gave.
    count: usize,
    row: usize,
    block: [*const u8; BLOCK],
    next: [*const u8; BLOCK],
}

impl<'a> Source<'a> {
    /// The rows of a task, which are then read in order. Asks for the first block.
    #[inline(always)]
    pub(super) fn new<S: Widen>(rows: &Rows<'a>, row_bytes: usize) -> Self {
        let (codes, none) = (rows.codes, [rows.codes.as_ptr(); BLOCK]);
        // All rows start on multiples of this.
        let apart = 1 << (codes.as_ptr() as usize | row_bytes | LINE).trailing_zeros();
        let mut source = Source {
            codes,
            ids: rows.ids,
            row_bytes,
            inner: codes.len().saturating_sub(SPARE) / row_bytes,
            copy: Vec::new(),
            spread: (row_bytes - 1) / LINE * LINE,
            beyond: (row_bytes - 1) % LINE >= apart,
            position: rows.range.start,
            end: rows.range.end,
            count: 0,
            row: 0,
            block: none,
            next: none,
        };
        for i in 0..source.find(rows.range.start) {
            source.ask::<S>(i);
        }
        source
    }

    /// Goes on to the next block: how many rows it has, none at the end.
    #[inline(always)]
    fn advance(&mut self) -> usize {
        let count = BLOCK.min(self.end - self.position);
        self.position += count;
        self.block = self.next;
        if count > 0 {
            self.find(self.position);
        }
        count
    }

    /// Finds the block from a position on. Those that are there already stay in the places of those that are not: asking
    /// for them again is free.
    #[inline(never)]
    fn find(&mut self, position: usize) -> usize {
        match self.ids.slice(position..self.ids.len().min(position + BLOCK)) {
            Ids::Range { start, len } => self.find_all(start..start + len),
            Ids::I32(ids) => self.find_all(ids.iter().map(|id| *id as usize)),
            Ids::I64(ids) => self.find_all(ids.iter().map(|id| *id as usize)),
        }
    }

    #[inline(always)]
    fn find_all(&mut self, ids: impl ExactSizeIterator<Item = usize>) -> usize {
        let count = ids.len();
        for (i, id) in ids.enumerate() {
            self.next[i] = match id < self.inner {
                true => self.codes.as_ptr().wrapping_add(id * self.row_bytes),
                false => self.outer(id),
            };
        }
        count
    }

    #[cold]
    fn outer(&mut self, id: usize) -> *const u8 {
        assert!(id < self.codes.len() / self.row_bytes, "an id outside the codes");
        if self.copy.is_empty() {
            self.copy = [&self.codes[self.inner * self.row_bytes..], &[0; SPARE]].concat();
        }
        self.copy.as_ptr().wrapping_add((id - self.inner) * self.row_bytes)
    }

    /// Asks for row `i` of the next block.
    #[inline(always)]
    fn ask<S: Widen>(&self, i: usize) {
        let row = self.next[i];
        S::prefetch(row);
        if self.beyond {
            S::prefetch(row.wrapping_add(self.row_bytes - 1));
        }
        let mut place = self.spread;
        while place > 0 {
            S::prefetch(row.wrapping_add(place));
            place -= LINE;
        }
    }

    /// The codes of the next row: `row_bytes` and [`SPARE`] more bytes can be read. Bodies of loops over rows are no
    /// closures: those may be left out of the function that has the instruction set.
    #[inline(always)]
    pub(super) fn next<S: Widen>(&mut self) -> Option<*const u8> {
        if self.row == self.count {
            (self.row, self.count) = (0, self.advance());
            if self.count == 0 {
                return None;
            }
        }
        self.ask::<S>(self.row);
        self.row += 1;
        Some(self.block[self.row - 1])
    }
}

/// Makes vectors of a row from its codes. Vector `v` stands at column `v * LANES`, the last one at the end of the row: it
/// may overlap the one before.
pub(super) trait Reader<S: Widen>: Copy {
    /// How many vectors make a row of `dim` values.
    #[inline(always)]
    fn vectors(&self, dim: usize) -> usize {
        dim.div_ceil(S::LANES)
    }

    /// Where the first of `N` vectors stands, see [`Reader::read`].
    #[inline(always)]
    fn column<const N: usize>(&self, vector: usize, dim: usize) -> usize {
        // A row has whole vectors for `N > 1`: their places need no test.
        if N > 1 {
            vector * S::LANES
        } else {
            (vector * S::LANES).min(dim - S::LANES)
        }
    }

    /// Where vector `i` of `N` stands.
    #[inline(always)]
    fn place<const N: usize>(&self, vector: usize, i: usize, dim: usize) -> usize {
        self.column::<N>(vector, dim) + i * S::LANES
    }

    /// `N` vectors from `vector` on, a multiple of `N`; if `N > 1` none of them is cut short by the row's end.
    ///
    /// # Safety
    ///
    /// `code` is a row of [`Source`].
    unsafe fn read<const N: usize>(&self, code: *const u8, vector: usize, dim: usize) -> [S; N];

    /// Sums and what [`Reader::read`] gives.
    ///
    /// # Safety
    ///
    /// As for [`Reader::read`].
    #[inline(always)]
    unsafe fn add<const N: usize>(&self, code: *const u8, vector: usize, dim: usize, mut sums: [S; N]) -> [S; N] {
        // SAFETY: passed on to the caller.
        unsafe {
            let values = self.read::<N>(code, vector, dim);
            for i in 0..N {
                sums[i] = values[i].add(sums[i]);
            }
        }
        sums
    }
}

/// Vectors of a row that are made at a time, of short rows or what is left of long ones.
const STEP: usize = 4;

/// As many again: what vectors share is read less often. For pools where the registers hold the sums beside what is
/// added.
const LONG_STEP: usize = 8;

/// What is done with rows: a dispatch that chose a [`Reader`], or found none, calls one of these.
pub(super) trait Job {
    /// With rows in vectors.
    ///
    /// # Safety
    ///
    /// The reader fits rows of `row_bytes` bytes and `dim` values.
    unsafe fn run<S: Widen>(self, reader: &impl Reader<S>, row_bytes: usize, dim: usize);

    /// With whole rows.
    ///
    /// # Safety
    ///
    /// As [`Decode::decode`] wants it.
    unsafe fn rows<S: Widen>(self, decoder: &impl Decode, dim: usize);
}

/// Decodes whole rows, where no [`Reader`] fits them.
pub(super) trait Decode {
    /// Decodes rows into `out`.
    ///
    /// # Safety
    ///
    /// The instruction set is there, and the decoder was made for a view that was checked.
    unsafe fn decode(&self, rows: &Rows, out: &mut [f32]);
}

/// Half precision.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct F16(pub(super) u16);

/// The upper half of single precision.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Bf16(pub(super) u16);

/// Type of the values of a lookup's output: values are made in single precision, and rounded as they are written.
pub(super) trait Number {
    /// What the output holds of a value.
    type Bits;
    /// Writes a vector.
    unsafe fn write<S: Widen, const WAY: u8>(vector: S, to: *mut Self::Bits);
    /// Writes whole rows.
    ///
    /// # Safety
    ///
    /// As [`Decode::decode`] wants it.
    unsafe fn rows<S: Widen>(decoder: &impl Decode, rows: &Rows, dim: usize, out: &mut [Self::Bits]);
}

impl Number for f32 {
    type Bits = f32;
    #[inline(always)]
    unsafe fn write<S: Widen, const WAY: u8>(vector: S, to: *mut f32) {
        // SAFETY: passed on to the caller.
        unsafe { vector.store_f32::<WAY>(to) }
    }
    #[inline(always)]
    unsafe fn rows<S: Widen>(decoder: &impl Decode, rows: &Rows, _: usize, out: &mut [f32]) {
        // SAFETY: passed on to the caller.
        unsafe { decoder.decode(rows, out) }
    }
}

macro_rules! narrow {
    ($name:ident, $store:ident, $round:ident) => {
        impl Number for $name {
            type Bits = u16;
            #[inline(always)]
            unsafe fn write<S: Widen, const WAY: u8>(vector: S, to: *mut u16) {
                // SAFETY: passed on to the caller.
                unsafe { vector.$store::<WAY>(to) }
            }
            #[inline(always)]
            unsafe fn rows<S: Widen>(decoder: &impl Decode, rows: &Rows, dim: usize, out: &mut [u16]) {
                let step = (ROUNDED / dim).max(1);
                let mut values = vec![0.0; (step * dim).min(out.len())];
                for (index, out) in out.chunks_mut(step * dim).enumerate() {
                    let (values, start) = (&mut values[..out.len()], index * step);
                    // SAFETY: passed on to the caller.
                    unsafe {
                        decoder.decode(&rows.part(start..start + out.len() / dim), values);
                        $round::<S>(values, out);
                    }
                }
            }
        }
    };
}

narrow!(F16, store_f16, to_f16);
narrow!(Bf16, store_bf16, to_bf16);

/// A job with whole rows.
struct RowsTask<'a, S, J, D> {
    job: J,
    decoder: &'a D,
    dim: usize,
    vector: PhantomData<S>,
}

impl<S: Widen, T: Number, D: Decode> Task for RowsTask<'_, S, Lookup<'_, T>, D> {
    #[inline(always)]
    unsafe fn run(self) {
        // SAFETY: passed on to the caller.
        unsafe { T::rows::<S>(self.decoder, self.job.rows, self.dim, self.job.out) }
    }
}

impl<S: Widen, D: Decode> Task for RowsTask<'_, S, Pool<'_>, D> {
    #[inline(always)]
    unsafe fn run(self) {
        let Pool { bags, out } = self.job;
        // SAFETY: passed on to the caller.
        scalar::pool(bags, self.dim, out, |rows, out| unsafe { self.decoder.decode(rows, out) });
    }
}

pub(super) struct Lookup<'a, T: Number> {
    pub(super) rows: &'a Rows<'a>,
    pub(super) out: &'a mut [T::Bits],
}

impl<T: Number> Job for Lookup<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Widen>(self, reader: &impl Reader<S>, row_bytes: usize, dim: usize) {
        let whole = |v: usize| reader.column::<1>(v, dim).is_multiple_of(S::LANES);
        let lines = (dim * size_of::<T::Bits>()).is_multiple_of(LINE) && (0..reader.vectors(dim)).all(whole);
        let place = self.out.as_ptr() as usize;
        let way = match self.rows.stream && lines {
            true if place.is_multiple_of(LINE) => STREAM,
            true if place.is_multiple_of(16) => STREAM_16,
            _ => CACHE,
        };
        // SAFETY: passed on to the caller.
        unsafe {
            S::enter(LookupTask::<S, T, _> { job: self, reader: *reader, row_bytes, dim, way, vector: PhantomData })
        }
    }

    #[inline(always)]
    unsafe fn rows<S: Widen>(self, decoder: &impl Decode, dim: usize) {
        // SAFETY: passed on to the caller.
        unsafe { S::enter(RowsTask::<S, _, _> { job: self, decoder, dim, vector: PhantomData }) }
    }
}

/// Decodes rows.
struct LookupTask<'a, S, T: Number, R> {
    job: Lookup<'a, T>,
    reader: R,
    row_bytes: usize,
    dim: usize,
    /// How vectors are written; past the caches only where rows of the output are whole lines.
    way: u8,
    vector: PhantomData<S>,
}

impl<S: Widen, T: Number, R: Reader<S>> Task for LookupTask<'_, S, T, R> {
    #[inline(always)]
    unsafe fn run(self) {
        // Copies, which no write to the output can change.
        let (reader, dim, way) = (self.reader, self.dim, self.way);
        let (vectors, whole) = (reader.vectors(dim), dim / S::LANES);
        let mut to = self.job.out.as_mut_ptr();
        let mut source = Source::new::<S>(self.job.rows, self.row_bytes);
        loop {
            let count = source.advance();
            for i in 0..count {
                source.ask::<S>(i);
                let code = source.block[i];
                // SAFETY: the code is a row of the source, and each vector has its place in a row of the output.
                unsafe {
                    let mut v = 0;
                    while v + LONG_STEP <= whole {
                        write::<S, T, LONG_STEP>(&reader, code, v, dim, to, way);
                        v += LONG_STEP;
                    }
                    while v + STEP <= whole {
                        write::<S, T, STEP>(&reader, code, v, dim, to, way);
                        v += STEP;
                    }
                    while v < vectors {
                        write::<S, T, 1>(&reader, code, v, dim, to, way);
                        v += 1;
                    }
                    to = to.add(dim);
                }
            }
            if count < BLOCK {
                break;
            }
        }
        if way != CACHE {
            S::fence();
        }
    }
}

#[inline(always)]
unsafe fn write<S: Widen, T: Number, const N: usize>(
    reader: &impl Reader<S>,
    code: *const u8,
    v: usize,
    dim: usize,
    to: *mut T::Bits,
    way: u8,
) {
    // SAFETY: passed on to the caller. Loops by index: an array that is iterated over stays in memory.
    unsafe {
        let values = reader.read::<N>(code, v, dim);
        match way {
            STREAM => {
                for i in 0..N {
                    T::write::<S, STREAM>(values[i], to.add(reader.place::<N>(v, i, dim)));
                }
            }
            STREAM_16 => {
                for i in 0..N {
                    T::write::<S, STREAM_16>(values[i], to.add(reader.place::<N>(v, i, dim)));
                }
            }
            _ => {
                for i in 0..N {
                    T::write::<S, CACHE>(values[i], to.add(reader.place::<N>(v, i, dim)));
                }
            }
        }
    }
}

pub(super) struct Pool<'a> {
    pub(super) bags: &'a Bags<'a>,
    pub(super) out: &'a mut [f32],
}

impl Job for Pool<'_> {
    #[inline(always)]
    unsafe fn run<S: Widen>(self, reader: &impl Reader<S>, row_bytes: usize, dim: usize) {
        // SAFETY: passed on to the caller.
        unsafe { S::enter(PoolTask::<S, _> { job: self, reader: *reader, row_bytes, dim, vector: PhantomData }) }
    }

    #[inline(always)]
    unsafe fn rows<S: Widen>(self, decoder: &impl Decode, dim: usize) {
        // SAFETY: passed on to the caller.
        unsafe { S::enter(RowsTask::<S, _, _> { job: self, decoder, dim, vector: PhantomData }) }
    }
}

struct PoolTask<'a, S, R> {
    job: Pool<'a>,
    reader: R,
    row_bytes: usize,
    dim: usize,
    vector: PhantomData<S>,
}

impl<S: Widen, R: Reader<S>> Task for PoolTask<'_, S, R> {
    #[inline(always)]
    unsafe fn run(self) {
        let (Pool { bags, out }, dim) = (self.job, self.dim);
        for (borders, out) in bags.borders.windows(2).zip(out.chunks_exact_mut(dim)) {
            if borders[0] == borders[1] && !bags.resume {
                out.fill(0.0);
            }
        }
        // SAFETY: passed on to the caller.
        unsafe {
            match (bags.max, bags.weights) {
                (true, _) => pool::<S, R, MAX>(self.reader, bags, &[], out, self.row_bytes, dim),
                (_, Some(weights)) => pool::<S, R, WEIGHTED>(self.reader, bags, weights, out, self.row_bytes, dim),
                _ => pool::<S, R, SUM>(self.reader, bags, &[], out, self.row_bytes, dim),
            }
        }
    }
}

/// How rows of a bag are combined.
const SUM: u8 = 0;
const WEIGHTED: u8 = 1;
const MAX: u8 = 2;

#[inline(always)]
unsafe fn pool<S: Widen, R: Reader<S>, const HOW: u8>(
    reader: R,
    bags: &Bags,
    weights: &[f32],
    out: &mut [f32],
    row_bytes: usize,
    dim: usize,
) {
    let (vectors, whole, resume) = (reader.vectors(dim), dim / S::LANES, bags.resume);
    // What the earlier rows of a bag came to, vector after vector.
    let mut earlier = vec![0.0; vectors * S::LANES];
    let mut source = Source::new::<S>(&bags.rows, row_bytes);
    let (mut bag, mut start) = (0, bags.rows.range.start);
    loop {
        let count = source.advance();
        let mut i = 0;
        // The part of each bag that lies in the block.
        while i < count {
            while bags.borders[bag + 1] as usize <= start + i {
                bag += 1;
            }
            let left = bags.borders[bag + 1] as usize - start;
            let part = Part {
                rows: i..count.min(left),
                begins: bags.borders[bag] as usize == start + i,
                ends: left <= count,
                resume,
                weights: if HOW == WEIGHTED { &weights[start..start + count] } else { weights },
                earlier: earlier.as_mut_ptr(),
                out: out[bag * dim..][..dim].as_mut_ptr(),
            };
            // SAFETY: each vector has its place in the row.
            unsafe {
                let mut v = 0;
                while S::REGISTERS > 16 && v + LONG_STEP <= whole {
                    combine::<S, R, LONG_STEP, HOW>(reader, &source, &part, v, dim);
                    v += LONG_STEP;
                }
                while v + STEP <= whole {
                    combine::<S, R, STEP, HOW>(reader, &source, &part, v, dim);
                    v += STEP;
                }
                while v < vectors {
                    combine::<S, R, 1, HOW>(reader, &source, &part, v, dim);
                    v += 1;
                }
                if part.ends && resume {
                    for v in 0..vectors {
                        S::load(part.earlier.add(v * S::LANES)).store(part.out.add(reader.column::<1>(v, dim)));
                    }
                }
            }
            i = part.rows.end;
        }
        start += count;
        if count < BLOCK {
            return;
        }
    }
}

/// Rows of a block that belong to one bag.
struct Part<'a> {
    rows: Range<usize>,
    /// They are the bag's first rows.
    begins: bool,
    /// They are its last rows.
    ends: bool,
    /// The bag goes on from what the output holds.
    resume: bool,
    /// Weights of all rows of the block, if there are any.
    weights: &'a [f32],
    /// Where the vectors wait between the parts of a bag: not in the output, where one may overlap another.
    earlier: *mut f32,
    /// The bag's row of the output.
    out: *mut f32,
}

#[inline(always)]
unsafe fn combine<S: Widen, R: Reader<S>, const N: usize, const HOW: u8>(
    reader: R,
    source: &Source,
    part: &Part,
    v: usize,
    dim: usize,
) {
    // SAFETY: the codes are rows of the source; the caller's vectors have their places in the row.
    unsafe {
        let place = |i: usize| part.out.add(reader.place::<N>(v, i, dim));
        let earlier = |i: usize| part.earlier.add((v + i) * S::LANES);
        let mut all = [S::splat(0.0); N];
        if !part.begins || part.resume {
            for i in 0..N {
                all[i] = S::load(if part.begins { place(i) } else { earlier(i) });
            }
        } else if HOW == MAX {
            all = reader.read::<N>(source.block[part.rows.start], v, dim);
        }
        for row in part.rows.start..part.rows.end {
            if v == 0 {
                source.ask::<S>(row);
            }
            if HOW == SUM {
                all = reader.add::<N>(source.block[row], v, dim, all);
                continue;
            }
            let values = reader.read::<N>(source.block[row], v, dim);
            match HOW {
                MAX => {
                    for i in 0..N {
                        all[i] = values[i].max(all[i]);
                    }
                }
                _ => {
                    let weight = S::splat(part.weights[row]);
                    for i in 0..N {
                        all[i] = values[i].fma(weight, all[i]);
                    }
                }
            }
        }
        for i in 0..N {
            all[i].store(if part.ends && !part.resume { place(i) } else { earlier(i) });
        }
    }
}
