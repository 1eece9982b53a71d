//! Form `segments`: groups of rows, each with a decoder of its own, so that rows may have codes of different lengths.
//!
//! The codes of a table are its groups' codes, one group behind the other, cut into as many pieces of equal length as
//! there are rows: a piece is not the code of its row.

use super::{inner_tensors, outer_tensors, take, Budget, Decoder, Form};
use crate::bits;
use crate::error::{Error, Result};
use crate::kernels::{Ids, Rows};
use crate::tensor::{Buffer, Dtype, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::sync::{Arc, OnceLock};

/// Rows of a group, and how they are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupSpec {
    rows: usize,
    decoder: Map<String, Value>,
}

/// The description of a `Segments` decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentsSpec {
    dim: usize,
    /// Whether a tensor tells each row's group; else the groups follow each other.
    map: bool,
    groups: Vec<GroupSpec>,
}

/// Groups of rows, each with a decoder of its own.
#[derive(Clone)]
pub struct Segments {
    dim: usize,
    rows: usize,
    groups: Vec<Group>,
    map: Option<Tensor>,
    ranks: Arc<OnceLock<Vec<u32>>>,
}

#[derive(Clone)]
struct Group {
    rows: usize,
    decoder: Decoder,
    /// Where its first row's code starts.
    start: usize,
}

/// Most groups.
const MOST_GROUPS: usize = 256;

/// Rows between two counts of how many rows of each group came before.
const RANK_ROWS: usize = 32;

/// Rows that are decoded at a time.
const BLOCK_ROWS: usize = 64;

impl Segments {
    /// The form's name.
    pub const FORM: &'static str = "segments";

    /// Decoders of groups. `group_of` tells the group of each row.
    pub fn new(decoders: Vec<Decoder>, group_of: &[u8]) -> Result<Self> {
        let mut counts = vec![0usize; decoders.len()];
        for group in group_of {
            match counts.get_mut(usize::from(*group)) {
                Some(count) => *count += 1,
                None => return Err(Error::shape("groups", format!("group {group}"), format!("0 to {}", counts.len()))),
            }
        }
        let sorted = group_of.windows(2).all(|pair| pair[0] <= pair[1]);
        let mut map = None;
        if !sorted {
            let width = map_bits(decoders.len());
            let mut packed = vec![0u8; bits::row_bytes(group_of.len(), width)];
            bits::pack(group_of.iter().map(|group| u32::from(*group)), width, &mut packed);
            map = Some(Tensor::new("map", Dtype::U8, vec![packed.len()], Buffer::copy_of(&packed)?)?);
        }
        let dim = decoders.first().map_or(0, Decoder::dim);
        Segments::check(dim, counts.into_iter().zip(decoders).collect(), |_| Ok(map))
    }

    pub(super) fn from_parts(spec: SegmentsSpec, tensors: &[Tensor], budget: &mut Budget) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if spec.groups.len() > MOST_GROUPS {
            return bad(format!("{} groups", spec.groups.len()), "1 to 256 groups");
        }
        let mut groups = Vec::new();
        for (at, group) in spec.groups.into_iter().enumerate() {
            groups.push((group.rows, budget.inner(group.decoder, &inner_tensors(tensors, &prefix(at)))?));
        }
        let count: usize = groups.iter().map(|(_, decoder)| decoder.tensors().len()).sum();
        if tensors.len() != count + usize::from(spec.map) {
            return bad(format!("{} tensors", tensors.len()), "those of the groups, and their map");
        }
        let map = |bytes| spec.map.then(|| take(tensors, "map", Some(Dtype::U8), &[bytes]).cloned()).transpose();
        Segments::check(spec.dim, groups, map)
    }

    /// `map` gets the bytes that a map of all rows takes.
    fn check(
        dim: usize,
        decoders: Vec<(usize, Decoder)>,
        map: impl FnOnce(usize) -> Result<Option<Tensor>>,
    ) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if decoders.is_empty() || decoders.len() > MOST_GROUPS {
            return bad(format!("{} groups", decoders.len()), "1 to 256 groups");
        }
        let (mut groups, mut start, mut rows) = (Vec::new(), 0usize, 0usize);
        for (at, (count, decoder)) in decoders.into_iter().enumerate() {
            if decoder.dim() != dim || !decoder.rows_apart() {
                return bad(format!("group {at}"), "decoders of all columns, without groups of their own");
            }
            let end = count.checked_mul(decoder.row_bytes()).and_then(|bytes| start.checked_add(bytes));
            groups.push(Group { rows: count, decoder, start });
            match (end, rows.checked_add(count)) {
                (Some(end), Some(sum)) => (start, rows) = (end, sum),
                _ => return bad(format!("{count} rows"), "sizes that do not overflow"),
            }
        }
        let bits = rows.checked_mul(map_bits(groups.len()) as usize);
        let map = map(bits.map_or(0, |bits| bits.div_ceil(8)))?;
        // Ranks are counted in 32 bits.
        if rows == 0 || (map.is_some() && (bits.is_none() || rows > u32::MAX as usize)) {
            return bad(format!("{rows} rows"), "at least one, and fewer than 2^32 with a map");
        }
        let segments = Segments { dim, rows, groups, map, ranks: Arc::default() };
        segments.check_map()?;
        Ok(segments)
    }

    /// Refuses a map that names a group that is not there, or more rows of a group than it has: no code is then read that
    /// is not there.
    fn check_map(&self) -> Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        let width = map_bits(self.groups.len());
        let mut left: Vec<usize> = self.groups.iter().map(|group| group.rows).collect();
        for row in 0..self.rows {
            let group = bits::get(map.data.bytes(), width, row) as usize;
            match left.get_mut(group).filter(|left| **left > 0) {
                Some(left) => *left -= 1,
                None => {
                    let found = format!("row {row} in group {group}");
                    return Err(Error::shape("the map of rows", found, "groups that have as many rows as they say"));
                }
            }
        }
        Ok(())
    }

    /// Number of rows: a decoder of groups is made for one table.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of all codes.
    pub fn code_bytes(&self) -> usize {
        self.groups.iter().map(|group| group.rows * group.decoder.row_bytes()).sum()
    }

    /// Where each group's codes stand among all, and what reads them.
    pub fn groups(&self) -> impl Iterator<Item = (std::ops::Range<usize>, &Decoder)> {
        self.groups
            .iter()
            .map(|group| (group.start..group.start + group.rows * group.decoder.row_bytes(), &group.decoder))
    }

    /// A row's group, and its number there.
    fn place(&self, row: usize) -> (usize, usize) {
        let Some(map) = &self.map else {
            let mut first = 0;
            for (at, group) in self.groups.iter().enumerate() {
                if row < first + group.rows {
                    return (at, row - first);
                }
                first += group.rows;
            }
            // Only a table holds this form, it has as many rows, and it checks ids before they come here.
            unreachable!("row {row} of {}", self.rows);
        };
        let width = map_bits(self.groups.len());
        // Counted outside of the lock, which a process that is forked meanwhile would wait for.
        let ranks = match self.ranks.get() {
            Some(ranks) => ranks,
            None => {
                let counted = self.count_ranks();
                self.ranks.get_or_init(|| counted)
            }
        };
        let codes = map.data.bytes();
        let group = bits::get(codes, width, row);
        let block = row / RANK_ROWS;
        let before = (block * RANK_ROWS..row).filter(|other| bits::get(codes, width, *other) == group).count();
        (group as usize, ranks[block * self.groups.len() + group as usize] as usize + before)
    }

    /// Rows of each group before each block of rows.
    fn count_ranks(&self) -> Vec<u32> {
        let width = map_bits(self.groups.len());
        let mut counts = vec![0u32; self.groups.len()];
        let mut ranks = Vec::with_capacity(self.rows.div_ceil(RANK_ROWS) * counts.len());
        let codes = self.map.as_ref().map_or(&[][..], |map| map.data.bytes());
        for row in 0..self.rows {
            if row % RANK_ROWS == 0 {
                ranks.extend_from_slice(&counts);
            }
            counts[bits::get(codes, width, row) as usize] += 1;
        }
        ranks
    }
}

/// Bits of a row in the map.
fn map_bits(groups: usize) -> u32 {
    (groups.max(2) - 1).ilog2() + 1
}

fn prefix(at: usize) -> String {
    format!("groups.{at}.")
}

impl Form for Segments {
    fn name(&self) -> &'static str {
        Segments::FORM
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn row_bytes(&self) -> usize {
        self.code_bytes().div_ceil(self.rows)
    }

    fn rows_apart(&self) -> bool {
        false
    }

    fn decode_floats(&self, rows: &Rows, out: &mut [f32]) {
        let mut values = Vec::new();
        for (block, out) in out.chunks_mut(BLOCK_ROWS * self.dim).enumerate() {
            let start = rows.range.start + block * BLOCK_ROWS;
            let places: Vec<(usize, usize)> =
                (start..start + out.len() / self.dim).map(|position| self.place(rows.ids.get(position))).collect();
            for (at, group) in self.groups.iter().enumerate() {
                let positions: Vec<usize> = (0..places.len()).filter(|position| places[*position].0 == at).collect();
                if positions.is_empty() {
                    continue;
                }
                // A map that was cut while mapped reads as zeros, which may name more rows of a group than it has.
                let last = group.rows.saturating_sub(1);
                let ids: Vec<i64> = positions.iter().map(|position| places[*position].1.min(last) as i64).collect();
                let codes = &rows.codes[group.start..group.start + group.rows * group.decoder.row_bytes()];
                values.clear();
                values.resize(positions.len() * self.dim, 0f32);
                if group.rows > 0 {
                    group.decoder.decode(codes, Ids::I64(&ids), &mut values);
                }
                for (position, values) in positions.into_iter().zip(values.chunks(self.dim)) {
                    out[position * self.dim..(position + 1) * self.dim].copy_from_slice(values);
                }
            }
        }
    }

    fn tensors(&self) -> Vec<Tensor> {
        let groups = self.groups.iter().enumerate();
        groups.flat_map(|(at, group)| outer_tensors(&group.decoder, &prefix(at))).chain(self.map.clone()).collect()
    }

    fn spec(&self) -> Value {
        let group = |group: &Group| GroupSpec { rows: group.rows, decoder: group.decoder.describe() };
        let groups = self.groups.iter().map(group).collect();
        serde_json::to_value(SegmentsSpec { dim: self.dim, map: self.map.is_some(), groups }).unwrap_or_default()
    }

    fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder> {
        let mut new = self.clone();
        for (at, group) in new.groups.iter_mut().enumerate() {
            group.decoder = group.decoder.with_tensors(&inner_tensors(tensors, &prefix(at)))?;
        }
        Ok(Decoder::Segments(new))
    }

    fn bad_row(&self, codes: &[u8]) -> Option<usize> {
        let bad = |(at, (range, decoder)): (usize, (std::ops::Range<usize>, &Decoder))| {
            let local = decoder.bad_row(codes.get(range)?)?;
            (0..self.rows).find(|row| self.place(*row) == (at, local))
        };
        self.groups().enumerate().filter_map(bad).min()
    }
}
