//! Writing: codes stream into a temporary file beside the target, the rest and the header follow, then a rename.

use super::header::{self, Entry};
use super::{block_hash, footer, Layout, TensorSpec, BLOCK};
use crate::error::{Error, Result};
use crate::table::map::{close, retried};
use crate::tensor::Tensor;
use serde_json::{Map, Value};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Writes one table file. Dropping it before [`Writer::finish`] leaves nothing behind.
pub struct Writer {
    /// As the caller wrote it, and the file that it leads to.
    path: PathBuf,
    target: PathBuf,
    layout: Layout,
    durable: bool,
    /// The folder of a durable file, to be synchronised; only Unix lets a folder be opened for that.
    folder: Option<File>,
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
        let io = |e| Error::io(path, e);
        let target = target(path).map_err(io)?;
        let file = Temporary::beside(&target).map_err(io)?;
        // Opened now: what fails late costs the work of hours.
        let folder = (durable && cfg!(unix)).then(|| retried(|| File::open(folder(&target)))).transpose();
        let folder = folder.map_err(|e| {
            Error::system(path, e, "its folder cannot be opened to synchronise it (durable=False does without)")
        })?;
        let out = Blocks::after(room, file).map_err(io)?;
        Ok(Writer { path: path.into(), target, layout, durable, folder, room, codes: 0, out })
    }

    /// Appends whole rows of codes.
    pub fn write_codes(&mut self, codes: &[u8]) -> Result<()> {
        if !codes.len().is_multiple_of(self.layout.row_bytes) {
            let expected = format!("whole rows of {} bytes", self.layout.row_bytes);
            return Err(Error::shape("a block of codes", format!("{} bytes", codes.len()), expected));
        }
        self.out.file.check_process().map_err(|e| Error::io(&self.path, e))?;
        self.codes += codes.len() as u64;
        self.out.write(codes).map_err(|e| Error::io(&self.path, e))
    }

    /// Writes the decoder's tensors, the extra ones, checksums and the header, and puts the file in its place.
    ///
    /// `description` replaces the one of the layout: numbers in it may differ, and nulls may have become numbers; the
    /// tensors are those of the layout. Where rows have no codes it says how many there are. Returns the bytes of the file.
    pub fn finish(mut self, description: Map<String, Value>, tensors: &[Tensor], extra: &[Tensor]) -> Result<u64> {
        self.out.file.check_process().map_err(|e| Error::io(&self.path, e))?;
        check_tensors(&self.layout.tensors, tensors)?;
        check_tensors(&self.layout.extra, extra)?;
        let rows = self.codes.checked_div(self.layout.row_bytes as u64);
        let rows = rows.or_else(|| description.get("rows")?.as_u64()).unwrap_or(0);
        let entries = header::entries(&self.layout, self.room, rows)?;
        self.layout.description = description;
        let header = header::header_bytes(&self.layout, self.room, &entries, rows)?;
        let tensors: Vec<&Tensor> = tensors.iter().chain(extra).collect();
        let Writer { path, target, durable, folder, out, .. } = self;
        write_rest(out, &entries, &header, &tensors)
            .and_then(|file| file.publish(&target, durable))
            .map_err(|e| Error::io(&path, e))?;
        folder.map_or(Ok(()), synchronise).map_err(|e| Error::system(&path, e, NOT_YET_DURABLE))?;
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
fn write_rest(mut out: Blocks, entries: &[Entry], header: &[u8], tensors: &[&Tensor]) -> io::Result<Temporary> {
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
            pad if pad.is_pad() => file.write(&vec![0; (pad.end - pad.start) as usize])?,
            blocks if blocks.is_blocks() => file.write(&hashes)?,
            last => file.write(&footer(header, &hashes, last.end))?,
        }
    }
    file.seek(0)?;
    file.write(header)?;
    Ok(file)
}

/// What is said where a file took its place and its folder was not synchronised: the one error after which the new
/// table is there. Trying again could succeed without the disk having the rename, so it is not tried.
const NOT_YET_DURABLE: &str = "the new table is in place, but a power cut may bring back what was there before";

/// The rename is on the disk once the folder is.
fn synchronise(folder: File) -> io::Result<()> {
    match folder.sync_all() {
        // Filesystems that know no such call for folders.
        Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        other => other,
    }
}

/// Bytes of a write, and what writes are aligned to. Systems keep what comes in one large piece in large pages, and
/// those are mapped up to thirty times faster on opening; from 4 MiB on, Linux takes its largest.
const CHUNK: usize = 4 << 20;

/// A file that is hashed in blocks while it is written behind a room for its header.
struct Blocks {
    file: Temporary,
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
    fn after(room: u64, mut file: Temporary) -> io::Result<Self> {
        file.seek(room)?;
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
        self.file.write(&chunk[missing..])
    }

    /// Writes the last, short chunk; returns the bytes of all hashes, those of the header's blocks included.
    fn finish(mut self, header: &[u8]) -> io::Result<(Temporary, Vec<u8>)> {
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

/// A file in the making: locked for as long as its writer lives, and removed if it does not get its name.
struct Temporary {
    file: File,
    /// Empty once the file has its name.
    path: PathBuf,
    /// The process that made it. In a copy of that process (fork) the same file stands under the same name.
    process: u32,
}

impl Temporary {
    /// A new file in the folder of `target`.
    fn beside(target: &Path) -> io::Result<Self> {
        let prefix = prefix(target.file_name().unwrap_or_default());
        // Best effort, also where the standard library panics, which it does if a folder cannot be closed.
        let _ = std::panic::catch_unwind(|| sweep(folder(target), &prefix));
        let mut options = File::options();
        options.write(true).create_new(true);
        // As any new file, so that the process's mask decides who may read it; what takes the place of a file gets
        // that one's permissions in the end, and is private until then.
        #[cfg(unix)]
        let replaces = retried(|| target.try_exists())?;
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, if replaces { 0o600 } else { 0o666 });
        let process = std::process::id();
        loop {
            let number = RandomState::new().hash_one(process);
            let path = folder(target).join(format!("{prefix}{process}.{number:x}"));
            let file = match retried(|| options.open(&path)) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                file => Temporary { file: file?, path, process },
            };
            // A filesystem without locks cannot tell a live writer from a dead one, and then nothing is swept either.
            let locked = retried(|| file.file.lock()).is_ok();
            if !locked || retried(|| file.path.try_exists()).unwrap_or(true) {
                return Ok(file);
            }
            // Another writer's sweep came between the two steps.
        }
    }

    fn check_process(&self) -> io::Result<()> {
        match self.process == std::process::id() {
            true => Ok(()),
            false => Err(io::Error::other("is being written by the process that this one was forked from")),
        }
    }

    fn seek(&mut self, to: u64) -> io::Result<u64> {
        retried(|| self.file.seek(SeekFrom::Start(to)))
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        // A device that takes no more bytes without saying why is full.
        self.file.write_all(bytes).map_err(|e| {
            if e.kind() == ErrorKind::WriteZero {
                ErrorKind::StorageFull.into()
            } else {
                e
            }
        })
    }

    /// Puts the finished file in the place of `target`.
    fn publish(mut self, target: &Path, durable: bool) -> io::Result<()> {
        match retried(|| fs::metadata(target)) {
            Ok(old) => retried(|| self.file.set_permissions(old.permissions()))?,
            Err(e) if e.kind() == ErrorKind::NotFound => (),
            Err(e) => return Err(e),
        }
        // Network filesystems tell what became of the last writes only now, and a failed one must not get the name. After
        // such an error the system takes the lost bytes for written: trying again would succeed.
        match durable {
            true => self.file.sync_all()?,
            false => close(retried(|| self.file.try_clone())?)?,
        }
        retried(|| fs::rename(&self.path, target))?;
        self.path = PathBuf::new();
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() && self.check_process().is_ok() {
            let _ = retried(|| fs::remove_file(&self.path));
        }
    }
}

/// What the temporary files of a target start with; the writer's process number follows. Only the start of long names,
/// so that a name can be as long as the system allows.
fn prefix(name: &OsStr) -> String {
    let name = name.to_string_lossy();
    let end = (0..=name.len().min(100)).rev().find(|end| name.is_char_boundary(*end));
    format!(".{}.vqrs-tmp.", &name[..end.unwrap_or(0)])
}

/// Removes temporary files whose writer ended without removing them. The system drops a lock with the process that
/// holds it, also on another machine or in another container, where process numbers would say nothing.
fn sweep(folder: &Path, prefix: &str) {
    let Ok(files) = folder.read_dir() else { return };
    for file in files.flatten() {
        let named = file.file_name().as_encoded_bytes().starts_with(prefix.as_bytes());
        // A pipe would be waited for.
        if named && file.file_type().is_ok_and(|found| found.is_file()) {
            sweep_one(&file.path());
        }
    }
}

/// Best effort: a file that cannot be opened or removed stays.
fn sweep_one(path: &Path) {
    // Network filesystems lock only what is open for writing; the permissions of a file may allow no more than reading.
    if let Ok(file) = File::options().write(true).open(path).or_else(|_| File::open(path)) {
        if file.try_lock().is_ok() {
            let _ = fs::remove_file(path);
        }
    }
}

/// The file that a path leads to, whatever the working folder will be later: links are followed, also one whose file is
/// not there yet. What is no regular file, a device for example, is refused rather than replaced.
fn target(path: &Path) -> io::Result<PathBuf> {
    let mut target = std::path::absolute(path)?;
    match retried(|| fs::metadata(&target)) {
        Ok(found) if found.is_dir() => return Err(ErrorKind::IsADirectory.into()),
        Ok(found) if !found.is_file() => {
            return Err(io::Error::new(ErrorKind::InvalidInput, "is no regular file: save under another name"));
        }
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        Err(_) if path.as_os_str().as_encoded_bytes().ends_with(b"/") => return Err(ErrorKind::IsADirectory.into()),
        _ => (),
    }
    // A circle of links was refused above.
    loop {
        match retried(|| fs::symlink_metadata(&target)) {
            Ok(found) if found.is_symlink() => target = folder(&target).join(retried(|| fs::read_link(&target))?),
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => return Ok(target),
        }
    }
}
