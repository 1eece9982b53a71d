//! Form `switch`: rows that are read in different ways, each case by a decoder with codes of its own.

use super::{inner_tensors, outer_tensors, take, Budget, Decoder, Form};
use crate::bits;
use crate::error::{Error, Result};
use crate::kernels::{Ids, Rows};
use crate::tensor::{Dtype, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Some rows, and how they are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseSpec {
    /// The first row, where they follow each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    start: Option<usize>,
    /// Bits of a row's number, where they stand in a list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bits: Option<u32>,
    rows: usize,
    decoder: Map<String, Value>,
}

/// The description of a `Switch` decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchSpec {
    dim: usize,
    cases: Vec<CaseSpec>,
    otherwise: Option<Map<String, Value>>,
    /// Names of tensors that are stored under another name.
    shared: BTreeMap<String, String>,
}

/// Rows that are read in different ways.
#[derive(Clone)]
pub struct Switch {
    /// Without the descriptions of decoders.
    spec: SwitchSpec,
    cases: Vec<Case>,
    /// Reads what belongs to no case, by the rows' own numbers and codes.
    otherwise: Option<Box<Decoder>>,
}

#[derive(Clone)]
struct Case {
    rows: Range,
    decoder: Decoder,
    codes: Option<Tensor>,
}

#[derive(Clone)]
enum Range {
    From(usize, usize),
    Listed(Listed),
}

/// Numbers in a rising list, packed; a number is found by its highest bits.
#[derive(Clone)]
struct Listed {
    numbers: Tensor,
    bits: u32,
    shift: u32,
    /// Where the numbers of each value of the highest bits start.
    starts: Arc<[u32]>,
}

/// Rows that are sorted by their cases at a time.
const BLOCK_ROWS: usize = 512;

/// Most cases.
const MOST_CASES: usize = 4096;

impl Listed {
    fn new(numbers: Tensor, bits: u32, len: usize) -> Result<Self> {
        let get = |at: usize| bits::get_wide(numbers.data.bytes(), bits, at);
        if let Some(at) = (1..len).find(|at| get(at - 1) >= get(*at)) {
            let found = format!("{} behind {}", get(at), get(at - 1));
            return Err(Error::shape("the list of rows", found, "rising numbers"));
        }
        let last = get(len - 1);
        let shift = (0..32).find(|shift| last >> shift <= len as u64).unwrap_or(32);
        let mut starts = vec![0u32; (last >> shift) as usize + 2];
        (0..len).for_each(|at| starts[(get(at) >> shift) as usize + 1] += 1);
        (1..starts.len()).for_each(|at| starts[at] += starts[at - 1]);
        Ok(Listed { numbers, bits, shift, starts: starts.into() })
    }

    fn find(&self, row: usize) -> Option<usize> {
        let high = row >> self.shift;
        let (mut low, end) = (*self.starts.get(high)? as usize, *self.starts.get(high + 1)? as usize);
        let get = |at: usize| bits::get_wide(self.numbers.data.bytes(), self.bits, at) as usize;
        let mut top = end;
        while low < top {
            let middle = (low + top) / 2;
            (low, top) = if get(middle) < row { (middle + 1, top) } else { (low, middle) };
        }
        (low < end && get(low) == row).then_some(low)
    }
}

impl Range {
    /// A row's number in the case.
    fn find(&self, row: usize) -> Option<usize> {
        match self {
            Range::From(start, rows) => row.checked_sub(*start).filter(|number| number < rows),
            Range::Listed(listed) => listed.find(row),
        }
    }
}

impl Switch {
    /// The form's name.
    pub const FORM: &'static str = "switch";

    pub(super) fn from_parts(mut spec: SwitchSpec, tensors: &[Tensor], budget: &mut Budget) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if spec.dim == 0 || spec.dim > 1 << 24 {
            return bad(format!("dim {}", spec.dim), "1 to 16777216 columns");
        }
        if spec.cases.is_empty() || spec.cases.len() > MOST_CASES {
            return bad(format!("{} cases", spec.cases.len()), "1 to 4096 cases");
        }
        let mut all = tensors.to_vec();
        let stored: HashMap<&str, &Tensor> = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        for (name, held) in &spec.shared {
            match stored.get(held.as_str()) {
                Some(tensor) if !stored.contains_key(name.as_str()) => all.push(tensor.renamed(name)),
                _ => return bad(format!("{name:?} stored as {held:?}"), "names of tensors that are there"),
            }
        }
        let mut decoder = |description: &mut Map<String, Value>, prefix: &str| {
            let decoder = budget.inner(std::mem::take(description), &inner_tensors(&all, prefix))?;
            match decoder.dim() == spec.dim && decoder.rows_apart() {
                true => Ok(decoder),
                false => {
                    let found = format!("the form {} of {} columns", decoder.form(), decoder.dim());
                    Err(Error::shape("the decoder", found, "decoders of all columns whose rows stand apart"))
                }
            }
        };
        let (mut cases, mut count) = (Vec::new(), 0);
        for (at, case) in spec.cases.iter_mut().enumerate() {
            let decoder = decoder(&mut case.decoder, &prefix(at))?;
            count += decoder.tensors().len();
            let rows = match (case.start, case.bits) {
                (Some(start), None) if case.rows > 0 => Range::From(start, case.rows),
                (None, Some(bits @ 1..=bits::MAX_WIDE_BITS)) if (1..u32::MAX as usize).contains(&case.rows) => {
                    count += 1;
                    let bytes = bits::row_bytes(case.rows, bits);
                    let numbers = take(&all, &own(at, "ids"), Some(Dtype::U8), &[bytes])?;
                    Range::Listed(Listed::new(numbers.clone(), bits, case.rows)?)
                }
                _ => return bad(format!("case {at} of {} rows", case.rows), "rows from a start on, or their bits"),
            };
            let codes = match decoder.row_bytes() {
                0 => None,
                bytes => {
                    count += 1;
                    let codes = take(&all, &own(at, "codes"), Some(Dtype::U8), &[case.rows, bytes])?;
                    if let Some(row) = decoder.bad_row(codes.data.bytes()) {
                        return bad(format!("row {row} of case {at} holds NaN or infinity"), "finite scales");
                    }
                    Some(codes.clone())
                }
            };
            cases.push(Case { rows, decoder, codes });
        }
        let otherwise = spec.otherwise.as_mut().map(|description| decoder(description, "otherwise.")).transpose()?;
        let otherwise = otherwise.map(Box::new);
        count += otherwise.as_ref().map_or(0, |decoder| decoder.tensors().len());
        if all.len() != count {
            return bad(format!("{} tensors", all.len()), "those of the cases");
        }
        Ok(Switch { spec, cases, otherwise })
    }
}

fn own(at: usize, name: &str) -> String {
    format!("cases.{at}.{name}")
}

fn prefix(at: usize) -> String {
    format!("cases.{at}.decoder.")
}

impl Form for Switch {
    fn name(&self) -> &'static str {
        Switch::FORM
    }

    fn dim(&self) -> usize {
        self.spec.dim
    }

    fn row_bytes(&self) -> usize {
        self.otherwise.as_ref().map_or(0, |decoder| decoder.row_bytes())
    }

    fn by_number(&self) -> bool {
        true
    }

    fn decode_floats(&self, rows: &Rows, out: &mut [f32]) {
        let dim = self.spec.dim;
        let (mut places, mut ids, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for (block, out) in out.chunks_mut(BLOCK_ROWS * dim).enumerate() {
            let start = rows.range.start + block * BLOCK_ROWS;
            places.clear();
            places.extend((0..out.len() / dim).map(|position| {
                let row = rows.ids.get(start + position);
                let case = self.cases.iter().enumerate();
                let found = case.filter_map(|(at, case)| Some((at, case.rows.find(row)?, position))).next();
                found.unwrap_or((self.cases.len(), row, position))
            }));
            places.sort_unstable();
            for places in places.chunk_by(|a, b| a.0 == b.0) {
                let (decoder, codes) = match self.cases.get(places[0].0) {
                    Some(case) => (Some(&case.decoder), case.codes.as_ref().map_or(&[][..], |c| c.data.bytes())),
                    None => (self.otherwise.as_deref(), rows.codes),
                };
                values.clear();
                values.resize(places.len() * dim, 0f32);
                if let Some(decoder) = decoder {
                    ids.clear();
                    ids.extend(places.iter().map(|place| place.1 as i64));
                    decoder.decode(codes, Ids::I64(&ids), &mut values);
                }
                for ((_, _, position), values) in places.iter().zip(values.chunks(dim)) {
                    out[position * dim..(position + 1) * dim].copy_from_slice(values);
                }
            }
        }
    }

    fn bad_row(&self, codes: &[u8]) -> Option<usize> {
        self.otherwise.as_ref().and_then(|decoder| decoder.bad_row(codes))
    }

    fn tensors(&self) -> Vec<Tensor> {
        let mut all = Vec::new();
        for (at, case) in self.cases.iter().enumerate() {
            if let Range::Listed(listed) = &case.rows {
                all.push(listed.numbers.renamed(own(at, "ids")));
            }
            all.extend(case.codes.as_ref().map(|codes| codes.renamed(own(at, "codes"))));
            all.extend(outer_tensors(&case.decoder, &prefix(at)));
        }
        all.extend(self.otherwise.iter().flat_map(|decoder| outer_tensors(decoder, "otherwise.")));
        all.retain(|tensor| !self.spec.shared.contains_key(&tensor.name));
        all
    }

    fn spec(&self) -> Value {
        let mut spec = self.spec.clone();
        for (described, case) in spec.cases.iter_mut().zip(&self.cases) {
            described.decoder = case.decoder.describe();
        }
        spec.otherwise = self.otherwise.as_ref().map(|decoder| decoder.describe());
        serde_json::to_value(spec).unwrap_or_default()
    }

    fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder> {
        let mut all = tensors.to_vec();
        for (name, held) in &self.spec.shared {
            all.extend(tensors.iter().find(|tensor| tensor.name == *held).map(|tensor| tensor.renamed(name)));
        }
        let (mut spec, mut kept) = (self.spec.clone(), Vec::new());
        for (at, case) in self.cases.iter().enumerate() {
            let decoder = case.decoder.with_tensors(&inner_tensors(&all, &prefix(at)))?;
            kept.extend(outer_tensors(&decoder, &prefix(at)));
            let names = ["ids", "codes"].map(|name| own(at, name));
            kept.extend(tensors.iter().filter(|tensor| names.contains(&tensor.name)).cloned());
            spec.cases[at].decoder = decoder.describe();
        }
        if let Some(decoder) = &self.otherwise {
            let decoder = decoder.with_tensors(&inner_tensors(&all, "otherwise."))?;
            kept.extend(outer_tensors(&decoder, "otherwise."));
            spec.otherwise = Some(decoder.describe());
        }
        kept.retain(|tensor| !spec.shared.contains_key(&tensor.name));
        Ok(Decoder::Switch(Switch::from_parts(spec, &kept, &mut Budget::default())?))
    }
}
