//! What the fuzz targets share: files made of bytes, and a little of everything that a table can do.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};
use twox_hash::{XxHash3_128, XxHash3_64};
use vqrs_core::decoder::Metric;
use vqrs_core::error::Error;
use vqrs_core::kernels::Ids;
use vqrs_core::matrix::Matrix;
use vqrs_core::pool::Context;
use vqrs_core::table::{Mode, Pooling, Table, Verify};
use vqrs_core::{search, Result};

const BLOCK: usize = 64 * 1024;
const MAGIC: [u8; 8] = *b"\x89vqrs\r\n\x1a";

/// Most rows and columns of a table that is searched and verified: inputs are to take little time.
const SMALL: usize = 4096;

/// A file around this header text and these tensors' bytes, with checksums that are right.
pub fn sealed(text: &[u8], body: &[u8]) -> Vec<u8> {
    let room = (text.len() + 8).next_multiple_of(4096);
    let mut all = ((room - 8) as u64).to_le_bytes().to_vec();
    all.extend_from_slice(text);
    all.resize(room, b' ');
    let header = all.clone();
    all.extend_from_slice(body);
    all.resize(all.len().next_multiple_of(64), 0);
    let sums: Vec<u8> = all
        .chunks(BLOCK)
        .enumerate()
        .flat_map(|(number, block)| XxHash3_64::oneshot_with_seed(number as u64, block).to_le_bytes())
        .collect();
    let mut hash = XxHash3_128::new();
    hash.write(&header);
    hash.write(&sums);
    all.extend_from_slice(&sums);
    all.resize(all.len().next_multiple_of(64), 0);
    all.extend_from_slice(&MAGIC);
    all.extend_from_slice(&hash.finish_128().to_le_bytes());
    let length = (all.len() + 8) as u64;
    all.extend_from_slice(&length.to_le_bytes());
    all
}

/// One tensor of a list: its name, the name of its type, the bytes of a value, its shape.
pub type Spec<'a> = (&'a str, &'a str, usize, Vec<usize>);

/// A file of this description (a JSON object without `rows` and `row_bytes`) and these tensors, the first of which are
/// the codes. Their bytes are taken from `data`, again and again.
pub fn made(description: &str, tensors: &[Spec], data: &[u8]) -> Vec<u8> {
    let (mut text, mut body, mut pads) = (String::new(), Vec::new(), 0);
    let mut put = |name: &str, dtype: &str, shape: &[usize], from: usize, to: usize| {
        text += &format!(",{name:?}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{from},{to}]}}");
    };
    let mut align = |body: &mut Vec<u8>, put: &mut dyn FnMut(&str, &str, &[usize], usize, usize)| {
        let (from, to) = (body.len(), body.len().next_multiple_of(64));
        if from < to {
            put(&format!("__pad.{pads}"), "U8", &[to - from], from, to);
            pads += 1;
            body.resize(to, 0);
        }
    };
    let mut source = data.iter().cycle();
    for (name, dtype, size, shape) in tensors {
        align(&mut body, &mut put);
        let bytes = shape.iter().product::<usize>() * size;
        let from = body.len();
        body.extend((0..bytes).map(|_| source.next().copied().unwrap_or(0)));
        put(name, dtype, shape, from, body.len());
    }
    align(&mut body, &mut put);
    // One page of header and few blocks of data, else nothing fits and the file is refused.
    let (start, blocks) = (body.len(), (16384 + body.len()).div_ceil(BLOCK));
    put("vqrs.blocks", "U64", &[blocks], start, start + 8 * blocks);
    let end = (start + 8 * blocks).next_multiple_of(64);
    if end > start + 8 * blocks {
        put(&format!("__pad.{pads}"), "U8", &[end - start - 8 * blocks], start + 8 * blocks, end);
    }
    put("vqrs.footer", "U8", &[32], end, end + 32);
    let quoted = description.replace('\\', "\\\\").replace('"', "\\\"");
    let text = format!("{{\"__metadata__\":{{\"format\":\"pt\",\"vqrs\":\"{quoted}\"}}{text}}}");
    // The same room whatever the text: the number of blocks was counted with it.
    let room = 16384 - 8;
    let padded = format!("{text:room$}");
    sealed(padded.as_bytes(), &body)
}

/// Opens the bytes as a file, in a way that they choose themselves, and uses what opens.
pub fn open(bytes: &[u8]) {
    static FILE: OnceLock<Mutex<(File, PathBuf)>> = OnceLock::new();
    let make = || {
        let folder = ["/dev/shm", "/tmp"].into_iter().find(|folder| PathBuf::from(folder).is_dir());
        let file = tempfile::tempfile_in(folder.unwrap_or(".")).expect("a temporary file");
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Mutex::new((file, path))
    };
    let mut held = FILE.get_or_init(make).lock().unwrap_or_else(PoisonError::into_inner);
    let (file, path) = &mut *held;
    file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).expect("an empty file");
    file.write_all(bytes).expect("a written file");
    let choice = XxHash3_64::oneshot(bytes);
    let verify = [Verify::Header, Verify::Lazy, Verify::Full][(choice % 3) as usize];
    let mode = [Mode::Mmap, Mode::Read][(choice >> 8 & 1) as usize];
    match Table::open(path, verify, mode) {
        Ok(table) => match uses(&table, choice) {
            Ok(()) | Err(Error::Corrupt { .. } | Error::Memory { .. } | Error::OutOfRange { .. }) => {}
            Err(error) => panic!("an open table says: {error}"),
        },
        Err(Error::Corrupt { .. } | Error::Version { .. } | Error::Memory { .. }) => {}
        Err(error) => panic!("opening says: {error}"),
    }
}

fn uses(table: &Table, choice: u64) -> Result<()> {
    let ctx = Context::default().serial();
    let (rows, dim) = (table.rows(), table.dim());
    table.info();
    table.nbytes()?;
    if rows == 0 || dim > SMALL {
        return Ok(());
    }
    let ids = [0, rows as i64 - 1, (choice >> 16) as i64 % rows as i64, rows as i64 / 2];
    let mut out = vec![f32::NAN; ids.len() * dim];
    table.lookup(Ids::I64(&ids), out.as_mut_slice(), &ctx)?;
    let first = out[..dim].to_vec();
    table.lookup(Ids::Range { start: 0, len: 1 }, &mut out[..dim], &ctx)?;
    assert!(first.iter().zip(&out).all(|(a, b)| a.to_bits() == b.to_bits()), "a row reads as two");
    for pooling in [Pooling::Sum, Pooling::Mean, Pooling::Max] {
        table.pool(Ids::I64(&ids), &[0, 1], None, pooling, &mut out[..2 * dim], &ctx)?;
    }
    if rows <= SMALL && rows * dim <= 1 << 16 {
        table.names()?;
        table.verify(&ctx)?;
        let query = vec![1f32; dim];
        for metric in [Metric::InnerProduct, Metric::L2, Metric::Cosine] {
            search::search(table, Matrix::new(&query, dim)?, 2, metric, &ctx)?;
        }
        if choice >> 32 & 63 == 0 {
            let folder = std::env::temp_dir().join(format!("vqrs-fuzz-{}", std::process::id()));
            table.save(&folder, false, &ctx)?;
            std::fs::remove_file(folder).expect("the file that was saved");
        }
    }
    Ok(())
}
