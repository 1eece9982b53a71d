//! Compressing to a file block by block: a codec at work on a table that need never be whole in memory.

use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::pool::Context;
use crate::quantizer::{Codec, ErrorSums};
use crate::table::format::Writer;
use crate::table::{describe, layout, names_tensors, About};
use crate::tensor::Tensor;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// Bytes of the file that `rows` rows of `codec`'s table need, names and metadata aside.
pub fn estimate(kind: &str, parameters: Map<String, Value>, rows: usize, dim: usize) -> Result<u64> {
    let quantizer = crate::quantizer::Kind::find(kind)?.make(parameters)?;
    if rows == 0 || dim == 0 {
        return Err(Error::shape("the table", format!("{rows} rows of {dim}"), "at least one row and one feature"));
    }
    if rows > 1 << 48 || dim > 1 << 24 {
        let expected = "at most 2^48 rows and 2^24 features";
        return Err(Error::shape("the table", format!("{rows} rows of {dim}"), expected));
    }
    let decoder = quantizer.blank(rows, dim)?;
    let about = About { kind: kind.into(), parameters: quantizer.parameters(), ..Default::default() };
    crate::table::format::file_size(&layout(&decoder, &about, &[]), rows as u64)
}

/// A table file in the making.
pub struct TableWriter {
    writer: Writer,
    codec: Codec,
    about: About,
    names: Vec<Tensor>,
    n_names: Option<usize>,
    sums: ErrorSums,
    weighted: bool,
    rows: usize,
}

impl TableWriter {
    /// Starts a file beside `path`; it takes that name when finished.
    pub fn create(
        path: &Path,
        codec: Codec,
        names: Option<&[String]>,
        metadata: BTreeMap<String, String>,
        durable: bool,
    ) -> Result<Self> {
        let about = About { kind: codec.kind().into(), parameters: codec.parameters(), errors: Map::new(), metadata };
        let n_names = names.map(<[String]>::len);
        let names = match names {
            Some(names) => <[Tensor; 2]>::from(names_tensors(names)?).to_vec(),
            None => Vec::new(),
        };
        let writer = Writer::create(path, layout(codec.decoder(), &about, &names), durable)?;
        Ok(TableWriter { writer, codec, about, names, n_names, sums: ErrorSums::default(), weighted: false, rows: 0 })
    }

    /// Encodes rows and appends them.
    pub fn write(&mut self, rows: Matrix, weights: Option<&[f64]>, ctx: &Context) -> Result<()> {
        rows.check_all(ctx).map_err(|error| error.after_rows(self.rows))?;
        if rows.rows() == 0 {
            return Ok(());
        }
        let codes = self.codec.encode(rows, ctx)?;
        self.sums.add(rows, &codes, weights, self.codec.decoder(), ctx)?;
        self.weighted |= weights.is_some();
        self.rows += rows.rows();
        self.writer.write_codes(&codes)
    }

    /// Completes the file under its name; returns its bytes. `errors` are added to those measured on the way.
    pub fn finish(mut self, errors: Map<String, Value>) -> Result<u64> {
        if self.rows == 0 {
            return Err(Error::shape("the table", "0 rows", "at least 1 row"));
        }
        if let Some(names) = self.n_names.filter(|names| *names != self.rows) {
            return Err(Error::shape(
                "names",
                format!("{names} names"),
                format!("one for each of the {} rows", self.rows),
            ));
        }
        self.about.errors = self.sums.finish(self.weighted);
        self.about.errors.extend(errors);
        let description = describe(self.codec.decoder(), &self.about, self.rows as u64);
        self.writer.finish(description, &self.codec.decoder().tensors(), &self.names)
    }
}
