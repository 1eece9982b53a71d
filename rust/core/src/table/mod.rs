//! A decoder with its codes: in memory or in a mapped file.

pub mod format;
pub mod map;

use crate::decoder::Decoder;
use crate::error::{product, reserved, room, Error, Result};
use crate::kernels::{Bags, Ids, Output, Rows};
use crate::pool::Context;
use crate::tensor::{Buffer, Dtype, Tensor};
use format::{File, Layout, TensorSpec, Writer};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

pub use format::{Mode, Verify};

/// Lookups below this many values stay on the calling thread: starting threads costs more than they save.
const PARALLEL_VALUES: usize = 1 << 20;

/// Rows that one task of a parallel lookup reads: few enough for all threads to end together.
const PARALLEL_ROWS: usize = 1024;

/// Bytes of output from which several threads write past the caches. One thread writes about as much to memory as all can
/// together, but the last cache takes more from each.
const PARALLEL_STREAM_BYTES: usize = 16 << 20;

/// Rows between two looks at cancellation, and of a task of other work.
const TASK_ROWS: usize = 4096;

/// Ids of one bag that are pooled between two looks at cancellation.
const PART_IDS: i64 = 1 << 16;

/// Values of a row, and bags, from which what a call takes beside its output is large.
const WIDE: usize = 1 << 14;

/// Most rows of a table that stores nothing for each: what a few bytes of a file may claim.
const MOST_ROWS: usize = 1 << 40;

/// How pooled rows are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their weighted sum.
    Sum,
    /// Their weighted sum over their number.
    Mean,
    /// Their largest value in each column.
    Max,
}

/// What a table says of itself, beside its decoder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    /// The quantizer's name.
    pub kind: String,
    /// The quantizer's parameters.
    pub parameters: Map<String, Value>,
    /// Relative errors by name; `relative` is the squared error over the squared norm.
    pub errors: Map<String, Value>,
    /// The user's own strings.
    pub metadata: BTreeMap<String, String>,
}

/// Names of rows, concatenated, with where each one ends.
#[derive(Clone)]
struct Names {
    text: Tensor,
    ends: Tensor,
    /// Rows by name, made on the first lookup.
    index: Arc<OnceLock<HashMap<String, usize>>>,
}

/// Errors that a description may state.
const ERRORS: [&str; 4] = ["relative", "centred", "weighted", "gaussian_bound"];

const NAMES: &str = "vqrs.names";
const NAME_ENDS: &str = "vqrs.names.ends";

/// A decoder with its codes.
#[derive(Clone)]
pub struct Table {
    decoder: Decoder,
    codes: Buffer,
    rows: usize,
    about: About,
    /// Filled on first use where a file has them.
    names: Arc<OnceLock<Option<Names>>>,
    file: Option<Arc<File>>,
    /// Nothing was changed since the file was opened.
    as_in_file: bool,
}

impl Table {
    /// The one door: checks that the codes are whole rows of the decoder.
    pub fn new(decoder: Decoder, codes: Buffer, rows: usize, about: About) -> Result<Self> {
        if let Decoder::Segments(segments) = &decoder {
            if segments.rows() != rows {
                return Err(Error::shape(
                    "codes",
                    format!("{rows} rows"),
                    format!("{}, as the groups", segments.rows()),
                ));
            }
        }
        if decoder.row_bytes() == 0 && rows > MOST_ROWS {
            return Err(Error::shape("codes", format!("{rows} rows"), format!("up to {MOST_ROWS} rows without codes")));
        }
        if Some(codes.bytes().len()) != rows.checked_mul(decoder.row_bytes()) {
            let found = format!("{} bytes", codes.bytes().len());
            return Err(Error::shape("codes", found, format!("{rows} rows of {} bytes", decoder.row_bytes())));
        }
        Ok(Table { decoder, codes, rows, about, names: Arc::new(None.into()), file: None, as_in_file: false })
    }

    /// Opens a table file.
    pub fn open(path: &Path, verify: Verify, mode: Mode) -> Result<Self> {
        Table::open_with(path, verify, mode, &Context::default())
    }

    /// [`Table::open`] in a context, which can be cancelled.
    pub fn open_with(path: &Path, verify: Verify, mode: Mode, ctx: &Context) -> Result<Self> {
        let mut file = File::open_with(path, verify, mode, ctx)?;
        let wrong = |why: String| Error::corrupt(path, why);
        let (mut description, metadata) = file.take_texts();
        let dim = description.get("dim").and_then(Value::as_u64);
        let kind = description.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
        let mut object = |key: &str| match description.remove(key) {
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(_) => Err(wrong(format!("{key} of the vqrs description is no object"))),
            None => Ok(None),
        };
        let decoder = object("decoder")?.ok_or_else(|| wrong("the header describes no decoder".into()))?;
        let decoder = Decoder::from_parts(decoder, file.tensors()).map_err(|error| match error {
            Error::UnknownForm { form, known } => {
                let why = format!("needs the decoder form {form:?}; this version reads {known}: install a newer vqrs");
                Error::Version { path: path.into(), why }
            }
            other => wrong(other.to_string()),
        })?;
        if decoder.row_bytes() != file.row_bytes() {
            return Err(wrong(format!("{} code bytes a row, expected {}", file.row_bytes(), decoder.row_bytes())));
        }
        if dim != Some(decoder.dim() as u64) {
            return Err(wrong(format!("the header's dim is not the decoder's {}", decoder.dim())));
        }
        let about = About {
            kind,
            parameters: object("parameters")?.unwrap_or_default(),
            errors: object("errors")?.unwrap_or_default(),
            metadata,
        };
        if let Some(error) = ERRORS.into_iter().find(|name| about.errors.get(*name).is_some_and(|e| !is_error(e))) {
            return Err(wrong(format!("the error {error} of the vqrs description is no number from 0 on")));
        }
        let mut table = Table::new(decoder, file.codes(), file.rows(), about).map_err(|e| wrong(e.to_string()))?;
        table.file = Some(Arc::new(file));
        (table.names, table.as_in_file) = (Arc::default(), true);
        if verify == Verify::Full {
            table.check_scales(ctx)?;
        }
        Ok(table)
    }

    /// Writes the table to a file under `path`, whatever stood there; returns the file's bytes.
    pub fn save(&self, path: &Path, durable: bool, ctx: &Context) -> Result<u64> {
        let (tensors, extra) = (self.decoder.tensors(), self.extra()?);
        // Copies, so that what is written below is what was found intact.
        let (tensors, extra) = (copies(&tensors)?, copies(&extra)?);
        self.intact()?;
        let mut writer = Writer::create(path, self.layout(&extra), durable)?;
        ctx.stage("save", self.rows as u64);
        let step = (1usize << 22).checked_div(self.row_bytes()).unwrap_or(self.rows) + 1;
        for start in (0..self.rows).step_by(step) {
            ctx.check()?;
            self.watch();
            let end = self.rows.min(start + step);
            // A damaged table must not get valid checksums by being saved again.
            self.file.as_ref().map_or(Ok(()), |file| file.check_rows(start..end))?;
            writer.write_codes(&self.codes()[start * self.row_bytes()..end * self.row_bytes()])?;
            ctx.advance((end - start) as u64);
        }
        self.intact()?;
        let description = describe(&self.decoder, &self.about, self.rows as u64);
        writer.finish(description, &tensors, &extra)
    }

    /// The same codes with other values in the decoder's tensors. The errors are forgotten.
    pub fn with_tensors(&self, tensors: &[Tensor]) -> Result<Self> {
        let decoder = self.decoder.with_tensors(tensors)?;
        self.intact()?;
        let about = About { errors: Map::new(), ..self.about.clone() };
        Ok(Table { decoder, about, as_in_file: false, ..self.clone() })
    }

    /// The same table with other names and metadata.
    pub fn with_metadata(&self, names: Option<&[String]>, metadata: BTreeMap<String, String>) -> Result<Self> {
        self.intact()?;
        let names = names.map(|names| Names::new(names, self.rows)).transpose()?;
        let about = About { metadata, ..self.about.clone() };
        Ok(Table { names: Arc::new(names.into()), about, as_in_file: false, ..self.clone() })
    }

    /// How codes are read.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// How codes are read, in memory of its own: for whoever outlives the file.
    pub fn own_decoder(&self) -> Result<Decoder> {
        self.watch();
        let decoder = self.decoder.with_tensors(&copies(&self.decoder.tensors())?)?;
        self.intact()?;
        Ok(decoder)
    }

    /// All codes, row after row.
    pub fn codes(&self) -> &[u8] {
        self.codes.bytes()
    }

    /// The bytes of the codes, to be shared.
    pub fn code_buffer(&self) -> &Buffer {
        &self.codes
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn dim(&self) -> usize {
        self.decoder.dim()
    }

    /// Bytes of a row's code.
    pub fn row_bytes(&self) -> usize {
        self.decoder.row_bytes()
    }

    /// What the table says of itself.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The file it was opened from.
    pub fn file(&self) -> Option<&File> {
        self.file.as_deref()
    }

    /// Bytes of the file, written or not.
    pub fn nbytes(&self) -> Result<u64> {
        match &self.file {
            Some(file) if self.as_in_file => Ok(file.len()),
            _ => format::file_size(&self.layout(&self.extra()?), self.rows as u64),
        }
    }

    /// Everything that the header says, as a JSON object.
    pub fn info(&self) -> Map<String, Value> {
        describe(&self.decoder, &self.about, self.rows as u64)
    }

    fn layout(&self, extra: &[Tensor]) -> Layout {
        layout(&self.decoder, &self.about, extra)
    }

    /// Decodes rows by id; `out` has `ids.len()` rows. Ids must be inside the table: see [`check_ids`].
    pub fn lookup<'a>(&self, ids: Ids, out: impl Into<Output<'a>>, ctx: &Context) -> Result<()> {
        let mut out = out.into();
        let wanted = ids.len() * self.dim();
        if out.len() != wanted {
            let expected = format!("{} rows of {} values", ids.len(), self.dim());
            return Err(Error::shape("out", format!("{} values", out.len()), expected));
        }
        self.watch();
        if self.dim() > WIDE {
            room("rows", &[self.scratch(ids.len(), ctx)])?;
        }
        self.touch_ids(ids, ctx)?;
        let parallel = wanted >= PARALLEL_VALUES && ctx.threads() > 1;
        let stream = out.bytes() > if parallel { PARALLEL_STREAM_BYTES } else { self.decoder.stream_bytes() };
        let rows = |range: Range<usize>| Rows { codes: self.codes(), ids, range, stream };
        if !parallel {
            // A row may take the time of a disk: few between two looks at cancellation.
            for start in (0..ids.len()).step_by(PARALLEL_ROWS) {
                ctx.check()?;
                let range = start..ids.len().min(start + PARALLEL_ROWS);
                let out = out.slice(range.start * self.dim()..range.end * self.dim());
                self.decoder.decode_rows(&rows(range), out);
            }
        } else {
            let starts = (0..ids.len()).step_by(PARALLEL_ROWS);
            let tasks = out.split(starts.map(|start| start..ids.len().min(start + PARALLEL_ROWS)), self.dim());
            ctx.each(tasks, |(range, out)| {
                self.decoder.decode_rows(&rows(range), out);
                Ok(())
            })?;
        }
        self.intact()
    }

    /// Combines the rows of each bag: bag `b` is `ids[offsets[b]..offsets[b + 1]]`, the last one up to the end. Empty
    /// bags give zeros.
    pub fn pool<'a>(
        &self,
        ids: Ids,
        offsets: &[i64],
        weights: Option<&[f32]>,
        pooling: Pooling,
        out: impl Into<Output<'a>>,
        ctx: &Context,
    ) -> Result<()> {
        let out = out.into();
        let borders = bag_borders(offsets, ids.len())?;
        if out.len() != offsets.len() * self.dim() {
            let expected = format!("{} rows of {} values", offsets.len(), self.dim());
            return Err(Error::shape("out", format!("{} values", out.len()), expected));
        }
        if let Some(weights) = weights {
            if weights.len() != ids.len() {
                let found = format!("{} values", weights.len());
                return Err(Error::shape("weights", found, format!("one for each of the {} ids", ids.len())));
            }
            if pooling == Pooling::Max {
                return Err(Error::parameter("weights", "given", "mode \"max\" takes no weights"));
            }
        }
        self.watch();
        if self.dim() > WIDE || offsets.len() > WIDE {
            let tasks = product(&[offsets.len(), size_of::<(Range<usize>, Output)>() + 16]);
            room("a pool", &[tasks, self.scratch(ids.len(), ctx)])?;
        }
        self.touch_ids(ids, ctx)?;
        let tasks = out.split(bag_tasks(&borders), self.dim());
        let small = ids.len() * self.dim() < PARALLEL_VALUES;
        let ctx = if small { &ctx.serial() } else { ctx };
        ctx.each(tasks, |(range, out)| {
            self.pool_task(ids, &borders[range.start..=range.end], weights, pooling, out, ctx)
        })?;
        self.intact()
    }

    /// Pools the bags between `borders`; a bag of very many ids part by part, so that the call can be cancelled.
    fn pool_task(
        &self,
        ids: Ids,
        borders: &[i64],
        weights: Option<&[f32]>,
        pooling: Pooling,
        out: Output,
        ctx: &Context,
    ) -> Result<()> {
        let pool = |borders: &[i64], resume: bool, out: &mut [f32]| {
            let range = borders[0] as usize..borders[borders.len() - 1] as usize;
            let rows = Rows { codes: self.codes(), ids, range, stream: false };
            self.decoder.pool(&Bags { rows, borders, weights, max: pooling == Pooling::Max, resume }, out);
        };
        let mut done = Ok(());
        crate::kernels::best().write(self.dim(), out, |range, out| {
            let borders = &borders[range.start..=range.end];
            if borders[borders.len() - 1] - borders[0] <= PART_IDS {
                pool(borders, false, out);
            } else {
                for (bag, out) in borders.windows(2).zip(out.chunks_exact_mut(self.dim())) {
                    let parts = (bag[0]..bag[1].max(bag[0] + 1)).step_by(PART_IDS as usize);
                    for start in parts {
                        done = std::mem::replace(&mut done, Ok(())).and_then(|()| ctx.check());
                        if done.is_ok() {
                            pool(&[start, bag[1].min(start + PART_IDS)], start > bag[0], out);
                        }
                    }
                }
            }
            if pooling == Pooling::Mean {
                for (bag, out) in borders.windows(2).zip(out.chunks_exact_mut(self.dim())) {
                    let count = (bag[1] - bag[0]).max(1) as f32;
                    out.iter_mut().for_each(|value| *value /= count);
                }
            }
        });
        done
    }

    /// Checks every byte of a file against its checksums, and every scale inside rows.
    pub fn verify(&self, ctx: &Context) -> Result<()> {
        self.watch();
        if let Some(file) = &self.file {
            file.verify(ctx)?;
        }
        self.check_scales(ctx)
    }

    /// Checks the scales inside rows, which checksums say nothing of.
    fn check_scales(&self, ctx: &Context) -> Result<()> {
        if !self.decoder.rows_apart() {
            let bad = self.decoder.bad_row(self.codes());
            return bad.map_or(Ok(()), |row| Err(self.damage(format!("row {row} holds NaN or infinity"))));
        }
        let bytes = self.row_bytes();
        let parts = if bytes > 0 { self.rows.div_ceil(TASK_ROWS) } else { 0 };
        ctx.stage("scales", parts as u64);
        let bad = ctx.map(parts, |index| {
            let start = index * TASK_ROWS;
            let end = self.rows.min(start + TASK_ROWS);
            ctx.advance(1);
            Ok(self.decoder.bad_row(&self.codes()[start * bytes..end * bytes]).map(|row| start + row))
        })?;
        self.intact()?;
        match bad.into_iter().flatten().next() {
            None => Ok(()),
            Some(row) => Err(self.damage(format!("row {row} holds NaN or infinity"))),
        }
    }

    /// Names of the rows, if the table carries them.
    pub fn names(&self) -> Result<Option<Vec<String>>> {
        let names = self.loaded_names()?.map(|names| names.iter().map(str::to_owned).collect());
        self.intact()?;
        Ok(names)
    }

    /// The first row of a name.
    pub fn find(&self, name: &str) -> Result<Option<usize>> {
        let names = self.loaded_names()?;
        self.intact()?;
        let Some(names) = names else { return Ok(None) };
        // Made here, and kept only where it was made of a file that was whole all the time.
        let row = match names.index.get() {
            Some(index) => index.get(name).copied(),
            None => {
                let index = names.make_index();
                self.intact()?;
                names.index.get_or_init(|| index).get(name).copied()
            }
        };
        Ok(row)
    }

    /// The names, from memory or from the file; checked once.
    fn loaded_names(&self) -> Result<Option<&Names>> {
        self.watch();
        if let (None, Some(file)) = (self.names.get(), &self.file) {
            let names = match (file.extra(NAMES)?, file.extra(NAME_ENDS)?) {
                (Some(text), Some(ends)) => {
                    let names = Names { text, ends, index: Arc::default() };
                    Some(names.check(self.rows).map_err(|why| self.damage(why))?)
                }
                _ => None,
            };
            self.intact()?;
            // Another thread may have been faster; its names are the same.
            let _ = self.names.set(names);
        }
        Ok(self.names.get().and_then(Option::as_ref))
    }

    /// The names' tensors, for saving.
    fn extra(&self) -> Result<Vec<Tensor>> {
        Ok(self.loaded_names()?.map_or_else(Vec::new, |names| vec![names.text.clone(), names.ends.clone()]))
    }

    /// To be called before codes or the decoder's tensors are read: see [`crate::tensor::Bytes::watch`].
    pub fn watch(&self) {
        self.codes.source().watch();
    }

    pub(crate) fn touch(&self, rows: Range<usize>) -> Result<()> {
        self.file.as_ref().map_or(Ok(()), |file| file.touch(rows))
    }

    fn touch_ids(&self, ids: Ids, ctx: &Context) -> Result<()> {
        let Some(file) = self.file.as_ref().filter(|file| file.is_lazy()) else { return Ok(()) };
        let range = match ids {
            _ if !self.decoder.rows_apart() => 0..self.rows,
            Ids::Range { start, len } => start..start + len,
            _ => {
                return (0..ids.len()).try_for_each(|index| {
                    if index.is_multiple_of(64) {
                        ctx.check()?;
                    }
                    file.touch(ids.get(index)..ids.get(index) + 1)
                })
            }
        };
        range.clone().step_by(TASK_ROWS).try_for_each(|start| {
            ctx.check()?;
            file.touch(start..range.end.min(start + TASK_ROWS))
        })
    }

    /// Bytes that decoding takes beside what it fills.
    fn scratch(&self, ids: usize, ctx: &Context) -> Option<usize> {
        product(&[ids.min(128 * ctx.threads()), self.dim(), 16])
    }

    /// Fails once the mapped file was found cut. Called behind every read.
    pub fn intact(&self) -> Result<()> {
        if self.codes.source().damaged() {
            let why =
                "the file was cut or overwritten while it was mapped, so that rows may be lost: open it again once it \
                       is whole, or with mode=\"read\" where files are changed in place";
            return Err(self.damage(why.into()));
        }
        Ok(())
    }

    fn damage(&self, why: String) -> Error {
        let path = self.file.as_ref().map_or_else(|| "a mapped table".into(), |file| file.path().to_owned());
        Error::corrupt(path, why)
    }
}

impl Names {
    fn new(names: &[String], rows: usize) -> Result<Self> {
        if names.len() != rows {
            let found = format!("{} names", names.len());
            return Err(Error::shape("names", found, format!("one for each of the {rows} rows")));
        }
        let (text, ends) = names_tensors(names)?;
        Ok(Names { text, ends, index: Arc::default() })
    }

    fn check(self, rows: usize) -> std::result::Result<Self, String> {
        if self.text.dtype != Dtype::U8 || self.ends.dtype != Dtype::U64 || self.ends.len() != rows {
            return Err(format!("names of {} rows, expected {rows}", self.ends.len()));
        }
        let mut last = 0;
        for end in self.ends() {
            let part = (last <= *end).then(|| self.text.data.bytes().get(last as usize..*end as usize)).flatten();
            if part.is_none_or(|bytes| std::str::from_utf8(bytes).is_err()) {
                return Err("names that are not text".into());
            }
            last = *end;
        }
        Ok(self)
    }

    fn ends(&self) -> &[u64] {
        bytemuck::cast_slice(self.ends.data.bytes())
    }

    fn iter(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends().iter().copied());
        let text = self.text.data.bytes();
        starts.zip(self.ends()).map(|(start, end)| {
            // Checked on loading; zeros where the file was cut since.
            text.get(start as usize..*end as usize)
                .and_then(|bytes| std::str::from_utf8(bytes).ok())
                .unwrap_or_default()
        })
    }

    fn make_index(&self) -> HashMap<String, usize> {
        let mut index = HashMap::new();
        for (row, name) in self.iter().enumerate() {
            index.entry(name.to_owned()).or_insert(row);
        }
        index
    }
}

/// The same tensors in memory of their own.
fn copies(tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    let copy = |tensor: &Tensor| Ok(Tensor { data: Buffer::copy_of(tensor.data.bytes())?, ..tensor.clone() });
    tensors.iter().map(copy).collect()
}

/// The tensors that carry names of rows.
pub fn names_tensors(names: &[String]) -> Result<(Tensor, Tensor)> {
    let length = names.iter().try_fold(0usize, |sum, name| sum.checked_add(name.len()));
    let (mut text, mut ends) = (reserved("the names", length)?, reserved::<u64>("the names", Some(names.len()))?);
    for name in names {
        text.extend_from_slice(name.as_bytes());
        ends.push(text.len() as u64);
    }
    Ok((
        Tensor::new(NAMES, Dtype::U8, vec![text.len()], Buffer::copy_of(&text)?)?,
        Tensor::new(NAME_ENDS, Dtype::U64, vec![ends.len()], Buffer::copy_of(bytemuck::cast_slice(&ends))?)?,
    ))
}

/// True for the value of an error, which may be unknown.
fn is_error(value: &Value) -> bool {
    value.is_null() || value.as_f64().is_some_and(|error| error >= 0.0)
}

/// The JSON object that a table's file carries.
pub fn describe(decoder: &Decoder, about: &About, rows: u64) -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("profile".into(), format::PROFILE.into());
    object.insert("requires".into(), Value::Array(Vec::new()));
    object.insert("kind".into(), about.kind.clone().into());
    object.insert("rows".into(), rows.into());
    object.insert("dim".into(), decoder.dim().into());
    object.insert("dtype".into(), "float32".into());
    object.insert("row_bytes".into(), decoder.row_bytes().into());
    object.insert("decoder".into(), Value::Object(decoder.describe()));
    object.insert("parameters".into(), Value::Object(about.parameters.clone()));
    object.insert("errors".into(), Value::Object(about.errors.clone()));
    object.insert("library".into(), concat!("vqrs ", env!("CARGO_PKG_VERSION")).into());
    object
}

/// What the file of a table looks like, its codes and numbers aside.
pub fn layout(decoder: &Decoder, about: &About, extra: &[Tensor]) -> Layout {
    let spec = |t: &Tensor| TensorSpec { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() };
    let mut description = describe(decoder, about, 0);
    // Room for every error that may be known by the end, so that the size does not depend on which are.
    let errors = ERRORS.map(|name| (name.to_owned(), 0.0.into()));
    let mut all = Map::from_iter(errors);
    all.extend(about.errors.clone());
    description.insert("errors".into(), Value::Object(all));
    Layout {
        description,
        metadata: about.metadata.clone(),
        row_bytes: decoder.row_bytes(),
        tensors: decoder.tensors().iter().map(spec).collect(),
        extra: extra.iter().map(spec).collect(),
    }
}

/// Where bags start and where the last one ends. Offsets start at 0, never fall and stay inside the ids.
fn bag_borders(offsets: &[i64], ids: usize) -> Result<Vec<i64>> {
    let wrong = |found: String| Error::shape("offsets", found, format!("numbers from 0, not falling, at most {ids}"));
    if offsets.first().is_some_and(|first| *first != 0) {
        return Err(wrong(format!("{} at position 0", offsets[0])));
    }
    if offsets.is_empty() && ids > 0 {
        return Err(wrong("no numbers".into()));
    }
    let mut borders = reserved("the offsets", offsets.len().checked_add(1))?;
    borders.extend_from_slice(offsets);
    borders.push(ids as i64);
    match borders.windows(2).position(|pair| pair[1] < pair[0]).filter(|_| !offsets.is_empty()) {
        Some(last) if last + 1 == offsets.len() => Err(wrong(format!("{} at position {last}", borders[last]))),
        Some(at) => Err(wrong(format!("{} at position {}, after {}", borders[at + 1], at + 1, borders[at]))),
        None => Ok(borders),
    }
}

/// Ranges of bags of about equally many ids, one after the other.
fn bag_tasks(borders: &[i64]) -> impl Iterator<Item = Range<usize>> + '_ {
    let bags = borders.len() - 1;
    let mut start = 0;
    std::iter::from_fn(move || {
        let first = start;
        let limit = borders.get(first)? + TASK_ROWS as i64;
        let inside = borders[first + 1..].iter().take(TASK_ROWS).take_while(|end| **end <= limit).count();
        start = bags.min(first + inside.max(1));
        (first < bags).then_some(first..start)
    })
}

/// Whether all ids are rows of a table; `Some` with ids counted from the end replaced, where there were negative ones.
pub fn check_ids(ids: Ids, rows: usize) -> Result<Option<Vec<i64>>> {
    let refuse = |position: usize, id: i64| Err(Error::Id { id, position, rows });
    let last = rows as i64 - 1;
    // The sign of what is gathered tells whether an id is negative or above the last one. No branch per id, so that it
    // runs in vectors.
    let fine = match ids {
        Ids::Range { start, len } if start.checked_add(len).is_some_and(|end| end <= rows) => return Ok(None),
        Ids::Range { start, len } => return refuse(0, start.saturating_add(len) as i64 - 1),
        Ids::I32(ids) => {
            let last = last.min(i32::MAX.into()) as i32;
            ids.iter().fold(0, |signs, id| signs | id | last.wrapping_sub(*id)) >= 0
        }
        Ids::I64(ids) => ids.iter().fold(0, |signs, id| signs | id | last.wrapping_sub(*id)) >= 0,
    };
    if fine {
        return Ok(None);
    }
    let wrap = |id: i64| id.wrapping_add((id >> 63) & rows as i64);
    let mut wrapped: Vec<i64> = reserved("the ids", Some(ids.len()))?;
    match ids {
        Ids::I32(ids) => wrapped.extend(ids.iter().map(|id| wrap((*id).into()))),
        Ids::I64(ids) => wrapped.extend(ids.iter().map(|id| wrap(*id))),
        Ids::Range { .. } => {}
    }
    if let Some(position) = wrapped.iter().position(|row| *row < 0 || *row > last) {
        let id = match ids {
            Ids::I32(ids) => ids[position].into(),
            Ids::I64(ids) => ids[position],
            Ids::Range { start, .. } => start as i64,
        };
        return refuse(position, id);
    }
    Ok(Some(wrapped))
}
