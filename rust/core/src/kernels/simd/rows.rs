//! The loops over rows that all decoders share: a lookup stores each row, a pool adds it to others in registers.

use super::{scalar, Ids, Task, Widen};
use crate::kernels::{Bags, Rows};
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes behind a row that a reader may read along with it.
pub(super) const SPARE: usize = 8;

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
    /// Lines that a row may touch after its first one.
    more_lines: usize,
    /// Position behind the block.
    position: usize,
    end: usize,
    block: [*const u8; BLOCK],
    next: [*const u8; BLOCK],
}

impl<'a> Source<'a> {
    /// The rows of a task, which are then read in order. Asks for the first block.
    #[inline(always)]
    pub(super) fn new<S: Widen>(rows: &Rows<'a>, row_bytes: usize) -> Self {
        let (codes, none) = (rows.codes, [rows.codes.as_ptr(); BLOCK]);
        let in_one = 64usize.is_multiple_of(row_bytes) && (codes.as_ptr() as usize).is_multiple_of(row_bytes);
        let mut source = Source {
            codes,
            ids: rows.ids,
            row_bytes,
            inner: codes.len().saturating_sub(SPARE) / row_bytes,
            copy: Vec::new(),
            more_lines: if in_one { 0 } else { (row_bytes + 62) / 64 },
            position: rows.range.start,
            end: rows.range.end,
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
        for line in 1..self.more_lines {
            S::prefetch(row.wrapping_add(64 * line));
        }
        if self.more_lines > 0 {
            // The last byte may stand in one line more.
            S::prefetch(row.wrapping_add(self.row_bytes - 1));
        }
    }

    /// Calls `work` with the codes of each row: `row_bytes` and [`SPARE`] more bytes can be read.
    #[inline(always)]
    pub(super) fn each<S: Widen>(&mut self, mut work: impl FnMut(*const u8)) {
        loop {
            let count = self.advance();
            for i in 0..count {
                self.ask::<S>(i);
                work(self.block[i]);
            }
            if count < BLOCK {
                return;
            }
        }
    }
}

/// Makes vectors of a row from its codes. Vector `v` stands at column `v * LANES`, the last one at the end of the row: it
/// may overlap the one before.
pub(super) trait Reader<S: Widen> {
    /// How many vectors make a row of `dim` values.
    #[inline(always)]
    fn vectors(&self, dim: usize) -> usize {
        dim.div_ceil(S::LANES)
    }

    /// Where vector `vector` stands.
    #[inline(always)]
    fn column(&self, vector: usize, dim: usize) -> usize {
        (vector * S::LANES).min(dim - S::LANES)
    }

    /// `N` vectors from `vector` on; if `N > 1` none of them is cut short by the row's end.
    ///
    /// # Safety
    ///
    /// `code` is a row of [`Source`].
    unsafe fn read<const N: usize>(&self, code: *const u8, vector: usize, dim: usize) -> [S; N];
}

/// Vectors of a row that a lookup makes at a time.
const STEP: usize = 4;

/// Vectors of a row that a pool keeps in registers.
const POOL_STEP: usize = 8;

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

/// A job with whole rows.
struct RowsTask<'a, J, D> {
    job: J,
    decoder: &'a D,
    dim: usize,
}

impl<D: Decode> Task for RowsTask<'_, Lookup<'_>, D> {
    #[inline(always)]
    unsafe fn run(self) {
        // SAFETY: passed on to the caller.
        unsafe { self.decoder.decode(self.job.rows, self.job.out) }
    }
}

impl<D: Decode> Task for RowsTask<'_, Pool<'_>, D> {
    #[inline(always)]
    unsafe fn run(self) {
        let Pool { bags, out } = self.job;
        // SAFETY: passed on to the caller.
        scalar::pool(bags, self.dim, out, |rows, out| unsafe { self.decoder.decode(rows, out) });
    }
}

pub(super) struct Lookup<'a> {
    pub(super) rows: &'a Rows<'a>,
    pub(super) out: &'a mut [f32],
}

impl Job for Lookup<'_> {
    #[inline(always)]
    unsafe fn run<S: Widen>(self, reader: &impl Reader<S>, row_bytes: usize, dim: usize) {
        let lines = dim.is_multiple_of(16) && (self.out.as_ptr() as usize).is_multiple_of(16);
        let whole = |v: usize| reader.column(v, dim).is_multiple_of(S::LANES);
        // SAFETY: passed on to the caller.
        unsafe {
            match self.rows.stream && lines && (0..reader.vectors(dim)).all(whole) {
                true => S::enter(LookupTask::<S, _, true> { job: self, reader, row_bytes, dim, vector: PhantomData }),
                false => S::enter(LookupTask::<S, _, false> { job: self, reader, row_bytes, dim, vector: PhantomData }),
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<S: Widen>(self, decoder: &impl Decode, dim: usize) {
        // SAFETY: passed on to the caller.
        unsafe { S::enter(RowsTask { job: self, decoder, dim }) }
    }
}

/// Decodes rows. With `STREAM`, vectors of the output start on multiples of 16 bytes.
struct LookupTask<'a, S, R, const STREAM: bool> {
    job: Lookup<'a>,
    reader: &'a R,
    row_bytes: usize,
    dim: usize,
    vector: PhantomData<S>,
}

impl<S: Widen, R: Reader<S>, const STREAM: bool> Task for LookupTask<'_, S, R, STREAM> {
    #[inline(always)]
    unsafe fn run(self) {
        let (reader, dim) = (self.reader, self.dim);
        let (vectors, whole) = (reader.vectors(dim), dim / S::LANES);
        let mut to = self.job.out.as_mut_ptr();
        let mut source = Source::new::<S>(self.job.rows, self.row_bytes);
        source.each::<S>(|code| {
            // SAFETY: the code is a row of the source, and each vector has its place in a row of the output.
            unsafe {
                let mut v = 0;
                while v + STEP <= whole {
                    write::<S, STEP, STREAM>(reader, code, v, dim, to);
                    v += STEP;
                }
                while v < vectors {
                    write::<S, 1, STREAM>(reader, code, v, dim, to);
                    v += 1;
                }
                to = to.add(dim);
            }
        });
        if STREAM {
            S::fence();
        }
    }
}

#[inline(always)]
unsafe fn write<S: Widen, const N: usize, const STREAM: bool>(
    reader: &impl Reader<S>,
    code: *const u8,
    v: usize,
    dim: usize,
    to: *mut f32,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        let values = reader.read::<N>(code, v, dim);
        for (i, value) in values.into_iter().enumerate() {
            let to = to.add(reader.column(v + i, dim));
            match STREAM {
                true => value.stream(to),
                false => value.store(to),
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
        unsafe { S::enter(PoolTask::<S, _> { job: self, reader, row_bytes, dim, vector: PhantomData }) }
    }

    #[inline(always)]
    unsafe fn rows<S: Widen>(self, decoder: &impl Decode, dim: usize) {
        // SAFETY: passed on to the caller.
        unsafe { S::enter(RowsTask { job: self, decoder, dim }) }
    }
}

struct PoolTask<'a, S, R> {
    job: Pool<'a>,
    reader: &'a R,
    row_bytes: usize,
    dim: usize,
    vector: PhantomData<S>,
}

impl<S: Widen, R: Reader<S>> Task for PoolTask<'_, S, R> {
    #[inline(always)]
    unsafe fn run(self) {
        let (Pool { bags, out }, reader, dim) = (self.job, self.reader, self.dim);
        let (vectors, whole) = (reader.vectors(dim), dim / S::LANES);
        for (borders, out) in bags.borders.windows(2).zip(out.chunks_exact_mut(dim)) {
            if borders[0] == borders[1] && !bags.resume {
                out.fill(0.0);
            }
        }
        // What the earlier rows of a bag came to, vector after vector.
        let mut earlier = vec![0.0; vectors * S::LANES];
        let mut source = Source::new::<S>(&bags.rows, self.row_bytes);
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
                    start: start + i,
                    begins: bags.borders[bag] as usize == start + i,
                    ends: left <= count,
                    earlier: earlier.as_mut_ptr(),
                    out: out[bag * dim..][..dim].as_mut_ptr(),
                };
                // SAFETY: each vector has its place in the row.
                unsafe {
                    let mut v = 0;
                    while v + POOL_STEP <= whole {
                        combine::<S, POOL_STEP>(reader, &source, bags, &part, v, dim);
                        v += POOL_STEP;
                    }
                    while v + STEP <= whole {
                        combine::<S, STEP>(reader, &source, bags, &part, v, dim);
                        v += STEP;
                    }
                    while v < vectors {
                        combine::<S, 1>(reader, &source, bags, &part, v, dim);
                        v += 1;
                    }
                    if part.ends && bags.resume {
                        for v in 0..vectors {
                            S::load(part.earlier.add(v * S::LANES)).store(part.out.add(reader.column(v, dim)));
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
}

/// Rows of a block that belong to one bag.
struct Part {
    rows: Range<usize>,
    /// Position of the first one.
    start: usize,
    /// They are the bag's first rows.
    begins: bool,
    /// They are its last rows.
    ends: bool,
    /// Where the vectors wait between the parts of a bag: not in the output, where one may overlap another.
    earlier: *mut f32,
    /// The bag's row of the output.
    out: *mut f32,
}

#[inline(always)]
unsafe fn combine<S: Widen, const N: usize>(
    reader: &impl Reader<S>,
    source: &Source,
    bags: &Bags,
    part: &Part,
    v: usize,
    dim: usize,
) {
    // SAFETY: the codes are rows of the source; the caller's vectors have their places in the row.
    unsafe {
        let place = |i: usize| part.out.add(reader.column(v + i, dim));
        let earlier = |i: usize| part.earlier.add((v + i) * S::LANES);
        let mut all = [S::splat(0.0); N];
        if !part.begins || bags.resume {
            for i in 0..N {
                all[i] = S::load(if part.begins { place(i) } else { earlier(i) });
            }
        } else if bags.max {
            all = reader.read::<N>(source.block[part.rows.start], v, dim);
        }
        for row in part.rows.clone() {
            if v == 0 {
                source.ask::<S>(row);
            }
            let values = reader.read::<N>(source.block[row], v, dim);
            if bags.max {
                for i in 0..N {
                    all[i] = values[i].max(all[i]);
                }
            } else {
                let position = part.start + row - part.rows.start;
                let weight = S::splat(bags.weights.map_or(1.0, |weights| weights[position]));
                for i in 0..N {
                    all[i] = values[i].fma(weight, all[i]);
                }
            }
        }
        for i in 0..N {
            all[i].store(if part.ends && !bags.resume { place(i) } else { earlier(i) });
        }
    }
}
