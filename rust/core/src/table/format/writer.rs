//! Writing: codes stream into a temporary file beside the target, the rest and the header follow, then a rename.

use super::header::{self, Entry};
use super::{block_hash, footer, Layout, TensorSpec, BLOCK};
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use serde_json::{Map, Value};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Writes one table file. Dropping it before [`Writer::finish`] leaves nothing behind.
pub struct Writer {
    path: PathBuf,
    layout: Layout,
    durable: bool,
    /// Bytes kept free for the header.
    room: u64,
    /// Bytes of codes so far.
    codes: u64,
    out: Blocks,
}

impl Writer {
    /// Starts a file that will take the place of `path`, and sweeps temporary files that ended writers left there.
    /// Without `durable` nothing waits for the disk, so that a power cut may lose the file.
    pub fn create(path: &Path, layout: Layout, durable: bool) -> Result<Self> {
        layout.check()?;
        let room = header::room(&layout)?;
        let path = &target(path)?;
        let io = |e| Error::io(path, e);
        let file = temporary(path).map_err(io)?;
        let out = Blocks::after(room, file).map_err(io)?;
        Ok(Writer { path: path.into(), layout, durable, room, codes: 0, out })
    }

    /// Appends whole rows of codes.
    pub fn write_codes(&mut self, codes: &[u8]) -> Result<()> {
        if !codes.len().is_multiple_of(self.layout.row_bytes) {
            let expected = format!("whole rows of {} bytes", self.layout.row_bytes);
            return Err(Error::shape("a block of codes", format!("{} bytes", codes.len()), expected));
        }
        self.codes += codes.len() as u64;
        self.out.write(codes).map_err(|e| Error::io(&self.path, e))
    }

    /// Writes the decoder's tensors, the extra ones, checksums and the header, and puts the file in its place.
    ///
    /// `description` replaces the one of the layout: numbers in it may differ, and nulls may have become numbers; the
    /// tensors are those of the layout. Where rows have no codes it says how many there are. Returns the bytes of the file.
    pub fn finish(mut self, description: Map<String, Value>, tensors: &[Tensor], extra: &[Tensor]) -> Result<u64> {
        check_tensors(&self.layout.tensors, tensors)?;
        check_tensors(&self.layout.extra, extra)?;
        let rows = self.codes.checked_div(self.layout.row_bytes as u64);
        let rows = rows.or_else(|| description.get("rows")?.as_u64()).unwrap_or(0);
        let entries = header::entries(&self.layout, self.room, rows)?;
        self.layout.description = description;
        let header = header::header_bytes(&self.layout, self.room, &entries, rows)?;
        let tensors: Vec<&Tensor> = tensors.iter().chain(extra).collect();
        let Writer { path, durable, out, .. } = self;
        write_rest(out, &entries, &header, &tensors)
            .and_then(|f| publish(f, &path, durable))
            .map_err(|e| Error::io(&path, e))?;
        Ok(entries.last().map_or(0, |entry| entry.end))
    }
}

fn check_tensors(specs: &[TensorSpec], tensors: &[Tensor]) -> Result<()> {
    let found: Vec<TensorSpec> = tensors.iter().map(TensorSpec::of).collect();
    if found != specs {
        return Err(Error::shape("the list of tensors", format!("{found:?}"), format!("{specs:?}, as announced")));
    }
    match tensors.iter().find(|t| !t.is_finite()) {
        None => Ok(()),
        Some(t) => Err(Error::OutOfRange {
            what: format!("{} holds NaN or infinity", t.name),
            why: "no reader would open the table".into(),
        }),
    }
}

/// Everything behind the codes, then the header into its room.
fn write_rest(mut out: Blocks, entries: &[Entry], header: &[u8], tensors: &[&Tensor]) -> io::Result<NamedTempFile> {
    // Tensors of the layout stand between the codes and the two checksums, pads in between.
    let (body, tail) = entries[1..].split_at(entries.iter().position(Entry::is_blocks).map_or(0, |at| at - 1));
    let mut tensors = tensors.iter();
    for entry in body {
        match entry.is_pad() {
            true => out.write(&vec![0; (entry.end - entry.start) as usize])?,
            false => out.write(tensors.next().map_or(&[], |t| t.data.bytes()))?,
        }
    }
    let (mut file, hashes) = out.finish(header)?;
    for entry in tail {
        match entry {
            pad if pad.is_pad() => file.write_all(&vec![0; (pad.end - pad.start) as usize])?,
            blocks if blocks.is_blocks() => file.write_all(&hashes)?,
            last => file.write_all(&footer(header, &hashes, last.end))?,
        }
    }
    file.seek(SeekFrom::Start(0))?;
    file.write_all(header)?;
    Ok(file)
}

fn publish(file: NamedTempFile, path: &Path, durable: bool) -> io::Result<()> {
    if durable {
        file.as_file().sync_all()?;
    }
    // What replaces a file is open to the same users.
    if let Ok(old) = std::fs::metadata(path) {
        file.as_file().set_permissions(old.permissions())?;
    }
    file.persist(path).map_err(|e| e.error)?;
    // The rename is on disk once the folder is; only Unix lets a folder be opened for that.
    #[cfg(unix)]
    if durable {
        File::open(folder(path))?.sync_all()?;
    }
    Ok(())
}

/// Bytes of a write, and what writes are aligned to. Systems keep what comes in one large piece in large pages, and
/// those are mapped up to thirty times faster on opening; from 4 MiB on, Linux takes its largest.
const CHUNK: usize = 4 << 20;

/// A file that is hashed in blocks while it is written behind a room for its header.
struct Blocks {
    file: NamedTempFile,
    /// The chunk that is being filled. The first one starts with `missing` bytes of header.
    pending: Vec<u8>,
    missing: usize,
    /// What follows the header in its last block, which is hashed last, because the header is known last.
    first: Vec<u8>,
    /// Hashes of the blocks behind that, and the number of the next one.
    hashes: Vec<u64>,
    number: u64,
}

impl Blocks {
    fn after(room: u64, mut file: NamedTempFile) -> io::Result<Self> {
        file.seek(SeekFrom::Start(room))?;
        let missing = (room % CHUNK as u64) as usize;
        let number = room.div_ceil(BLOCK as u64);
        Ok(Blocks { file, pending: vec![0; missing], missing, first: Vec::new(), hashes: Vec::new(), number })
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            // Whole chunks go out without a copy.
            if let (true, Some((chunk, rest))) = (self.pending.is_empty(), bytes.split_at_checked(CHUNK)) {
                self.emit(chunk)?;
                bytes = rest;
                continue;
            }
            let (now, rest) = bytes.split_at(bytes.len().min(CHUNK - self.pending.len()));
            self.pending.extend_from_slice(now);
            bytes = rest;
            if self.pending.len() == CHUNK {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut chunk = std::mem::take(&mut self.pending);
        self.emit(&chunk)?;
        chunk.clear();
        self.pending = chunk;
        Ok(())
    }

    /// Hashes and writes what starts at the border of a chunk.
    fn emit(&mut self, chunk: &[u8]) -> io::Result<()> {
        let missing = std::mem::take(&mut self.missing);
        let known = chunk.len().min(missing.next_multiple_of(BLOCK));
        self.first.extend_from_slice(&chunk[missing..known]);
        for block in chunk[known..].chunks(BLOCK) {
            self.hashes.push(block_hash(self.number, block));
            self.number += 1;
        }
        self.file.write_all(&chunk[missing..])
    }

    /// Writes the last, short chunk; returns the bytes of all hashes, those of the header's blocks included.
    fn finish(mut self, header: &[u8]) -> io::Result<(NamedTempFile, Vec<u8>)> {
        self.flush()?;
        let start = [header, &self.first].concat();
        let early = start.chunks(BLOCK).enumerate().map(|(number, block)| block_hash(number as u64, block));
        Ok((self.file, early.chain(self.hashes).flat_map(u64::to_le_bytes).collect()))
    }
}

// ---------------------------------------------------------------- temporary files

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What the temporary files of a target start with; the writer's process number follows.
fn prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".vqrs-tmp.");
    prefix
}

/// A new file beside `path`, locked for as long as its writer lives.
fn temporary(path: &Path) -> io::Result<NamedTempFile> {
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "names no file"))?;
    sweep(folder(path), &prefix(name));
    let mut own = prefix(name);
    own.push(format!("{}.", std::process::id()));
    let mut builder = tempfile::Builder::new();
    builder.prefix(&own);
    // As any new file: the process's mask decides who may read it, where temporary files are else private.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    loop {
        let file = builder.tempfile_in(folder(path))?;
        // A filesystem without locks cannot tell a live writer from a dead one, and then nothing is swept either.
        if file.as_file().lock().is_err() || file.path().exists() {
            return Ok(file);
        }
        // Another writer's sweep came between the two steps.
    }
}

/// Removes temporary files whose writer ended without removing them. The system drops a lock with the process that
/// holds it, also on another machine or in another container, where process numbers would say nothing.
fn sweep(folder: &Path, prefix: &OsStr) {
    let Ok(files) = folder.read_dir() else { return };
    for file in files.flatten() {
        if file.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
            sweep_one(&file.path());
        }
    }
}

/// Best effort: a file that cannot be opened or removed stays.
fn sweep_one(path: &Path) {
    if let Ok(file) = File::options().write(true).open(path) {
        if file.try_lock().is_ok() {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Where a file is really written: links are followed, and what is no regular file, a device for example, is refused
/// rather than replaced.
fn target(path: &Path) -> Result<std::path::PathBuf> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_file() => std::fs::canonicalize(path).map_err(|e| Error::io(path, e)),
        Ok(found) if !found.is_dir() => {
            let kind = std::io::ErrorKind::InvalidInput;
            Err(Error::io(path, std::io::Error::new(kind, "is no regular file: save under another name")))
        }
        // A folder is refused where the file would take its place, by the system.
        _ => Ok(path.into()),
    }
}
