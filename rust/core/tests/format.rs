//! The file: golden bytes, cut, damaged and hostile files.

use proptest::prelude::*;
use serde_json::{json, Map, Value};
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use twox_hash::{XxHash3_128, XxHash3_64};
use vqrs_core::pool::Context;
use vqrs_core::table::format::{file_size, File, Layout, Mode, TensorSpec, Verify, Writer, BLOCK};
use vqrs_core::tensor::{Buffer, Dtype, Tensor};
use vqrs_core::{Error, Result};

const FOOTER: usize = 32;

// ---------------------------------------------------------------- tables to look at

/// A table with a tensor of each type, sizes that need pads, row names and the user's own metadata.
struct Sample {
    layout: Layout,
    codes: Vec<u8>,
    tensors: Vec<Tensor>,
    extra: Vec<Tensor>,
}

impl Sample {
    fn new(rows: usize, row_bytes: usize) -> Self {
        let values: Vec<f32> = (0..12).map(|v| v as f32 / 8.0 - 0.5).collect();
        let floats = |name: &str, dtype| Tensor::of_floats(name, dtype, vec![4, 3], &values).unwrap();
        let tensors = vec![
            floats("codebooks.0", Dtype::F16),
            floats("codebooks.1", Dtype::Bf16),
            floats("mean", Dtype::F32),
            raw("map", Dtype::U8, vec![5], &[3, 1, 4, 1, 5]),
        ];
        let offsets: Vec<u8> = [0_u64, 2, 5].iter().flat_map(|v| v.to_le_bytes()).collect();
        let extra = vec![
            raw("vqrs.names", Dtype::U8, vec![5], b"anbob"),
            raw("vqrs.names.offsets", Dtype::U64, vec![3], &offsets),
        ];
        let layout = Layout {
            description: object(json!({"dim": 3, "kind": "product", "relative_error": null})),
            metadata: [("origin".to_string(), "a \"test\"\n".to_string())].into(),
            row_bytes,
            tensors: tensors.iter().map(TensorSpec::of).collect(),
            extra: extra.iter().map(TensorSpec::of).collect(),
        };
        let codes = (0..rows * row_bytes).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
        Sample { layout, codes, tensors, extra }
    }

    fn rows(&self) -> u64 {
        (self.codes.len() / self.layout.row_bytes) as u64
    }

    /// Writes it, handing over `chunk` rows at a time.
    fn save_in(&self, path: &Path, chunk: usize) -> Result<u64> {
        let mut writer = Writer::create(path, self.layout.clone(), false)?;
        for codes in self.codes.chunks(chunk * self.layout.row_bytes) {
            writer.write_codes(codes)?;
        }
        writer.finish(self.described(), &self.tensors, &self.extra)
    }

    fn described(&self) -> Map<String, Value> {
        object(json!({"dim": 3, "kind": "product", "relative_error": 0.0625}))
    }

    fn save(&self, path: &Path) {
        self.save_in(path, 1000).unwrap();
    }
}

fn raw(name: &str, dtype: Dtype, shape: Vec<usize>, bytes: &[u8]) -> Tensor {
    Tensor::new(name, dtype, shape, Buffer::copy_of(bytes).unwrap()).unwrap()
}

fn object(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn small() -> Sample {
    Sample::new(7, 3)
}

/// Four and a bit blocks of codes, so that some blocks hold nothing else.
fn large() -> Sample {
    Sample::new(4 * BLOCK / 16 + 100, 16)
}

struct Place {
    folder: TempDir,
    path: PathBuf,
}

fn place() -> Place {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("table.safetensors");
    Place { folder, path }
}

impl Place {
    fn files(&self) -> Vec<String> {
        let names = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> = names.map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path, Verify::Header, Mode::Mmap)
}

fn open_fully(path: &Path) -> Result<()> {
    open(path)?.verify(&Context::new(Some(1), 0))
}

fn refusal<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("this was accepted"),
        Err(e @ (Error::Corrupt { .. } | Error::Version { .. })) => e.to_string(),
        Err(e) => panic!("not a refusal of the file: {e:?}"),
    }
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    TensorSpec::of(a) == TensorSpec::of(b) && a.data.bytes() == b.data.bytes()
}

// ---------------------------------------------------------------- forging files with right checksums

fn header_length(bytes: &[u8]) -> usize {
    u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

fn header_of(bytes: &[u8]) -> String {
    String::from_utf8(bytes[8..8 + header_length(bytes)].to_vec()).unwrap().trim_end().to_string()
}

/// Where a tensor stands in a file that this library wrote.
fn range_of(bytes: &[u8], name: &str) -> std::ops::Range<usize> {
    let header: Value = serde_json::from_str(&header_of(bytes)).unwrap();
    let at = |i: usize| 8 + header_length(bytes) + header[name]["data_offsets"][i].as_u64().unwrap() as usize;
    at(0)..at(1)
}

/// Makes all checksums right again. `blocks` is where they stand.
fn seal(bytes: &mut [u8], blocks: std::ops::Range<usize>) {
    let hashes: Vec<u8> = bytes[..blocks.start]
        .chunks(BLOCK)
        .enumerate()
        .flat_map(|(number, block)| XxHash3_64::oneshot_with_seed(number as u64, block).to_le_bytes())
        .collect();
    bytes[blocks].copy_from_slice(&hashes);
    let (header, footer) = (8 + header_length(bytes), bytes.len() - FOOTER);
    let hash = XxHash3_128::oneshot(&[&bytes[..header], &hashes].concat());
    bytes[footer + 8..footer + 24].copy_from_slice(&hash.to_le_bytes());
}

/// The file with another header of the same room, sealed.
fn with_header(bytes: &[u8], header: &str) -> Vec<u8> {
    let (mut forged, room) = (bytes.to_vec(), header_length(bytes));
    forged[8..8 + room].fill(b' ');
    forged[8..8 + header.len()].copy_from_slice(header.as_bytes());
    seal(&mut forged, range_of(bytes, "vqrs.blocks"));
    forged
}

fn bytes_of(sample: &Sample) -> Vec<u8> {
    let place = place();
    sample.save(&place.path);
    fs::read(&place.path).unwrap()
}

fn refused(bytes: &[u8]) -> String {
    let place = place();
    fs::write(&place.path, bytes).unwrap();
    refusal(open(&place.path))
}

// ---------------------------------------------------------------- what was written is read

#[test]
fn a_file_says_what_was_written() {
    for (sample, verify, mode) in [
        (small(), Verify::Header, Mode::Mmap),
        (small(), Verify::Full, Mode::Read),
        (large(), Verify::Lazy, Mode::Mmap),
        (large(), Verify::Full, Mode::Mmap),
        (Sample::new(0, 5), Verify::Full, Mode::Mmap),
    ] {
        let place = place();
        let written = sample.save_in(&place.path, 333).unwrap();
        let file = File::open(&place.path, verify, mode).unwrap();
        assert_eq!(file.codes().bytes(), sample.codes);
        assert_eq!((file.rows() as u64, file.row_bytes()), (sample.rows(), sample.layout.row_bytes));
        assert_eq!((file.len(), file.path()), (written, place.path.as_path()));
        assert_eq!(file.metadata(), &sample.layout.metadata);
        assert!(file.tensors().iter().zip(&sample.tensors).all(|(a, b)| same(a, b)));
        assert_eq!(file.tensors().len(), sample.tensors.len());
        for extra in &sample.extra {
            assert!(same(&file.extra(&extra.name).unwrap().unwrap(), extra));
        }
        assert!(file.extra("vqrs.blocks").unwrap().is_none() && file.extra("mean").unwrap().is_none());
        let mut expected = sample.described();
        expected.extend(object(json!({"profile": "vqrs-table/1", "requires": []})));
        expected.extend(object(json!({"rows": sample.rows(), "row_bytes": sample.layout.row_bytes})));
        assert_eq!(file.description(), &expected);
        file.touch(0..file.rows()).unwrap();
        file.verify(&Context::default()).unwrap();
        assert!(!file.damaged());
    }
}

#[test]
fn golden_bytes() {
    let golden = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/format-1.safetensors"));
    assert_eq!(bytes_of(&small()), fs::read(golden).unwrap(), "the file of this version may not change any more");
    let file = File::open(golden, Verify::Full, Mode::Mmap).unwrap();
    assert_eq!(file.codes().bytes(), small().codes);
    assert_eq!(file.tensors()[2].floats()[..3], [-0.5, -0.375, -0.25]);
}

#[test]
fn any_safetensors_reader_opens_it() {
    for sample in [small(), large(), Sample::new(0, 5)] {
        let bytes = bytes_of(&sample);
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("codes").unwrap().data(), sample.codes);
        for tensor in sample.tensors.iter().chain(&sample.extra) {
            let found = file.tensor(&tensor.name).unwrap();
            assert_eq!((found.data(), found.shape()), (tensor.data.bytes(), tensor.shape.as_slice()));
            assert_eq!(format!("{:?}", found.dtype()), tensor.dtype.name());
            assert_eq!(range_of(&bytes, &tensor.name).start % 64, 0);
        }
        assert_eq!(range_of(&bytes, "codes").start % 4096, 0);
    }
}

#[test]
fn the_size_is_known_before() {
    for (rows, row_bytes) in [(0, 1), (1, 1), (64, 1), (3, 65_536), (4096, 15), (61_441, 1), (200_000, 9), (5, 61_440)]
    {
        let (sample, place) = (Sample::new(rows, row_bytes), place());
        let size = sample.save_in(&place.path, 1000).unwrap();
        assert_eq!(size, file_size(&sample.layout, rows as u64).unwrap());
        assert_eq!(size, fs::metadata(&place.path).unwrap().len());
        open_fully(&place.path).unwrap();
    }
    let (base, rows) = (file_size(&small().layout, 0).unwrap(), 1_u64 << 40);
    let size = file_size(&small().layout, rows).unwrap();
    let blocks = 8 * (3 * rows / BLOCK as u64);
    assert!((base + 3 * rows + blocks..base + 3 * rows + blocks + 128).contains(&size), "{size}");
    for rows in [u64::MAX, u64::MAX / 3 - 10] {
        assert!(matches!(file_size(&small().layout, rows), Err(Error::OutOfRange { .. })));
    }
}

#[test]
fn bytes_do_not_depend_on_how_codes_arrive() {
    let (sample, place) = (Sample::new(9 << 16, 16), place());
    let expected = bytes_of(&sample);
    fs::write(&place.path, &expected).unwrap();
    open_fully(&place.path).unwrap();
    for chunk in [7, 4095, 4096, 261_888, 262_144, 300_000, 1 << 20] {
        sample.save_in(&place.path, chunk).unwrap();
        assert!(fs::read(&place.path).unwrap() == expected, "{chunk} rows at a time");
    }
}

#[test]
fn headers_larger_than_a_block() {
    let mut sample = large();
    for length in [BLOCK - 4096 - 2000, BLOCK - 4096, BLOCK, 3 * BLOCK, 4 << 20, 5 << 20] {
        sample.layout.metadata.insert("note".into(), "x".repeat(length));
        let place = place();
        assert_eq!(sample.save_in(&place.path, 999).unwrap(), file_size(&sample.layout, sample.rows()).unwrap());
        open_fully(&place.path).unwrap();
    }
    sample.layout.metadata.insert("note".into(), "x".repeat(16 << 20));
    assert!(matches!(file_size(&sample.layout, 1), Err(Error::OutOfRange { .. })));
}

#[test]
fn a_table_of_codes_alone() {
    let place = place();
    let layout = Layout { row_bytes: 2, ..Layout::default() };
    let mut writer = Writer::create(&place.path, layout, true).unwrap();
    writer.write_codes(&[1, 2, 3, 4]).unwrap();
    writer.finish(Map::new(), &[], &[]).unwrap();
    let file = open(&place.path).unwrap();
    file.verify(&Context::default()).unwrap();
    assert_eq!((file.rows(), file.tensors().len()), (2, 0));
}

#[test]
fn a_table_of_rows_without_codes() {
    let place = place();
    let tensor = raw("arrays.0", Dtype::U8, vec![3], &[1, 2, 3]);
    let layout = Layout { tensors: vec![TensorSpec::of(&tensor)], ..Layout::default() };
    let writer = Writer::create(&place.path, layout, true).unwrap();
    writer.finish(object(json!({"rows": 1_000_000})), &[tensor], &[]).unwrap();
    let file = open(&place.path).unwrap();
    file.verify(&Context::default()).unwrap();
    file.check_rows(0..1_000_000).unwrap();
    assert_eq!((file.rows(), file.row_bytes(), file.codes().bytes().len(), file.tensors().len()), (1_000_000, 0, 0, 1));
    assert!(file.len() < 8192);
}

// ---------------------------------------------------------------- the writer's door

#[test]
fn the_writer_refuses_what_no_reader_opens() {
    let place = place();
    let spec = |name: &str, shape: &[usize]| TensorSpec { name: name.into(), dtype: Dtype::U8, shape: shape.into() };
    let edits: [&dyn Fn(&mut Layout); 12] = [
        &|l| l.row_bytes = usize::MAX,
        &|l| l.tensors.push(spec("codes", &[1])),
        &|l| l.tensors.push(spec("", &[1])),
        &|l| l.tensors.push(spec("__pad.0", &[1])),
        &|l| l.tensors.push(spec("mean", &[1])),
        &|l| l.tensors.push(spec("vqrs.names2", &[1])),
        &|l| l.extra.push(spec("names", &[1])),
        &|l| l.extra.push(spec("vqrs.footer", &[1])),
        &|l| l.tensors.push(spec("empty", &[0, 1 << 40])),
        &|l| l.tensors.push(spec("deep", &[1; 9])),
        &|l| drop(l.metadata.insert("vqrs".into(), String::new())),
        &|l| drop(l.metadata.insert("format".into(), String::new())),
    ];
    for edit in edits {
        let mut layout = small().layout;
        edit(&mut layout);
        let refused = Writer::create(&place.path, layout.clone(), false).err();
        assert!(matches!(refused, Some(Error::Parameter { .. })), "{layout:?}");
        assert!(file_size(&layout, 1).is_err());
    }
    let mut layout = small().layout;
    layout.tensors = (0..4000).map(|n| spec(&format!("t{n}"), &[1])).collect();
    assert!(matches!(Writer::create(&place.path, layout, false).err(), Some(Error::OutOfRange { .. })));
    assert!(place.files().is_empty());
}

#[test]
fn a_refused_finish_leaves_nothing() {
    let (place, sample) = (place(), small());
    let start = || Writer::create(&place.path, sample.layout.clone(), false).unwrap();
    let mut partial = start();
    assert!(matches!(partial.write_codes(&[1, 2, 3, 4]), Err(Error::Shape { .. })));
    drop(partial);
    assert!(start().finish(sample.described(), &sample.tensors[1..], &sample.extra).is_err());
    let long = object(json!({"kind": "x".repeat(5000)}));
    assert!(matches!(start().finish(long, &sample.tensors, &sample.extra), Err(Error::Shape { .. })));
    let mut tensors = sample.tensors.clone();
    tensors[2].data = Buffer::copy_of(bytemuck::cast_slice(&[f32::NAN; 12])).unwrap();
    let refused = start().finish(sample.described(), &tensors, &sample.extra);
    assert!(matches!(refused, Err(Error::OutOfRange { .. })));
    drop(start());
    assert!(place.files().is_empty(), "{:?}", place.files());
    let nowhere = place.folder.path().join("no/such/folder/t");
    assert!(
        matches!(Writer::create(&nowhere, sample.layout, false).err(), Some(Error::Io { path, .. }) if path == nowhere)
    );
}

#[test]
fn two_writers_of_one_path() {
    let (place, first, second) = (place(), Sample::new(5, 2), Sample::new(9, 2));
    let mut writers: Vec<Writer> =
        [&first, &second].map(|s| Writer::create(&place.path, s.layout.clone(), true).unwrap()).into();
    writers[0].write_codes(&first.codes).unwrap();
    writers[1].write_codes(&second.codes).unwrap();
    let finish = |w: Writer, s: &Sample| w.finish(s.described(), &s.tensors, &s.extra).unwrap();
    finish(writers.pop().unwrap(), &second);
    let mapped = open(&place.path).unwrap();
    finish(writers.pop().unwrap(), &first);
    assert_eq!(open(&place.path).unwrap().rows(), 5);
    // Whoever has the replaced table open keeps it.
    mapped.verify(&Context::default()).unwrap();
    assert_eq!(mapped.codes().bytes(), second.codes);
    assert_eq!(place.files(), ["table.safetensors"]);
}

#[test]
fn stale_temporary_files_are_swept() {
    let (place, sample) = (place(), small());
    let stale = place.folder.path().join(".table.safetensors.vqrs-tmp.1.abcdef");
    let other = place.folder.path().join(".other.safetensors.vqrs-tmp.1.abcdef");
    fs::write(&stale, "left by a writer that was killed").unwrap();
    fs::write(&other, "belongs to another target").unwrap();
    let live = Writer::create(&place.path, sample.layout.clone(), false).unwrap();
    assert!(!stale.exists() && other.exists());
    sample.save(&place.path);
    assert_eq!(place.files().len(), 3, "the live writer's file stays");
    drop(live);
    assert_eq!(place.files().len(), 2);
}

#[cfg(unix)]
#[test]
fn a_table_is_as_readable_as_any_new_file() {
    use std::os::unix::fs::PermissionsExt;
    let place = place();
    let plain = place.folder.path().join("plain");
    fs::write(&plain, "").unwrap();
    small().save(&place.path);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&place.path), mode(&plain));
}

// ---------------------------------------------------------------- damage

/// Flips one bit at a time in place.
fn flip(file: &mut fs::File, at: usize, byte: u8) {
    file.seek(SeekFrom::Start(at as u64)).unwrap();
    file.write_all(&[byte]).unwrap();
}

#[test]
fn every_flipped_bit_of_a_small_file_is_refused() {
    let place = place();
    let bytes = bytes_of(&small());
    fs::write(&place.path, &bytes).unwrap();
    let mut file = fs::File::options().write(true).open(&place.path).unwrap();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            flip(&mut file, at, bytes[at] ^ 1 << bit);
            // All of it is in the block that holds the decoder, or behind: opening alone must see it.
            assert!(open(&place.path).is_err(), "bit {bit} of byte {at}");
        }
        flip(&mut file, at, bytes[at]);
    }
    open_fully(&place.path).unwrap();
}

#[test]
fn flipped_bits_of_a_large_file_are_refused() {
    let place = place();
    let bytes = bytes_of(&large());
    fs::write(&place.path, &bytes).unwrap();
    let mut file = fs::File::options().write(true).open(&place.path).unwrap();
    let (codes, decoder) = (range_of(&bytes, "codes"), range_of(&bytes, "codebooks.0").start);
    for at in (0..bytes.len()).filter(|at| at.is_multiple_of(977) || *at > codes.end - 2) {
        let bit = at % 8;
        flip(&mut file, at, bytes[at] ^ 1 << bit);
        let opened = open(&place.path);
        if at < 8 + header_length(&bytes) || at >= decoder {
            assert!(opened.is_err(), "bit {bit} of byte {at}");
        } else if let Ok(file) = opened {
            assert!(refusal(file.verify(&Context::default())).contains("checksum"));
        }
        flip(&mut file, at, bytes[at]);
    }
    open_fully(&place.path).unwrap();
}

#[test]
fn every_cut_is_refused() {
    let place = place();
    for bytes in [bytes_of(&small()), bytes_of(&large())] {
        fs::write(&place.path, &bytes).unwrap();
        let file = fs::File::options().write(true).open(&place.path).unwrap();
        let step = |at: &usize| bytes.len() < 10_000 || at.is_multiple_of(997) || *at + 300 > bytes.len();
        for length in (0..bytes.len()).rev().filter(step) {
            file.set_len(length as u64).unwrap();
            refusal(open(&place.path));
            refusal(File::open(&place.path, Verify::Header, Mode::Read));
        }
    }
}

#[test]
fn appended_bytes_are_refused() {
    for more in [1, 31, 64, 4096, 100_000] {
        for byte in [0, b' '] {
            let mut bytes = bytes_of(&small());
            bytes.resize(bytes.len() + more, byte);
            assert!(refused(&bytes).contains("appended"));
        }
    }
}

#[test]
fn lazy_checks_find_damage_where_it_is_touched() {
    let (place, sample) = (place(), large());
    let mut bytes = bytes_of(&sample);
    let at = range_of(&bytes, "codes").start + 2 * BLOCK;
    bytes[at] ^= 1;
    fs::write(&place.path, &bytes).unwrap();
    let file = File::open(&place.path, Verify::Lazy, Mode::Mmap).unwrap();
    let row = 2 * BLOCK / 16;
    let block = BLOCK / 16;
    for _ in 0..2 {
        file.touch(0..row - block).unwrap();
        file.touch(row + block..file.rows()).unwrap();
        file.touch(row..row).unwrap();
        assert!(refusal(file.touch(row..row + 1)).contains("(block 2)"));
        refusal(file.touch(0..file.rows()));
    }
    open(&place.path).unwrap().touch(0..file.rows()).unwrap();
    refusal(File::open(&place.path, Verify::Full, Mode::Read));
}

#[test]
fn extra_tensors_are_checked_on_first_use() {
    let mut sample = small();
    let names = vec![b'n'; 3 * BLOCK];
    sample.extra = vec![raw("vqrs.names", Dtype::U8, vec![names.len()], &names)];
    sample.layout.extra = sample.extra.iter().map(TensorSpec::of).collect();
    let mut bytes = bytes_of(&sample);
    let last = range_of(&bytes, "vqrs.names").end - 1;
    bytes[last] ^= 1;
    let place = place();
    fs::write(&place.path, &bytes).unwrap();
    let file = open(&place.path).unwrap();
    refusal(file.extra("vqrs.names"));
    refusal(file.verify(&Context::default()));
}

#[test]
fn pads_and_values_are_checked_behind_right_checksums() {
    let bytes = bytes_of(&small());
    let blocks = range_of(&bytes, "vqrs.blocks");
    let forge = |at: usize, new: &[u8]| {
        let mut forged = bytes.clone();
        forged[at..at + new.len()].copy_from_slice(new);
        seal(&mut forged, blocks.clone());
        refused(&forged)
    };
    assert!(forge(range_of(&bytes, "__pad.0").start, &[1]).contains("__pad.0"));
    assert!(forge(range_of(&bytes, "__pad.4").end - 1, &[1]).contains("__pad.4"));
    assert!(forge(blocks.end, &[1]).contains("pad before the footer"));
    assert!(forge(range_of(&bytes, "codebooks.0").start + 4, &[0, 0xfc]).contains("codebooks.0 holds NaN or infinity"));
    assert!(forge(range_of(&bytes, "codebooks.1").start, &[0x80, 0x7f]).contains("codebooks.1"));
    assert!(forge(range_of(&bytes, "mean").end - 4, &[0, 0, 0xc0, 0x7f]).contains("mean"));
    assert!(forge(bytes.len() - FOOTER, b"V").contains("footer starts with"));
    assert!(forge(bytes.len() - 8, &[0]).contains("footer says"));
    // Behind the first block, where opening does not look, verifying does.
    let mut bytes = bytes_of(&large());
    let blocks = range_of(&bytes, "vqrs.blocks");
    let pad = range_of(&bytes, "__pad.4").start;
    bytes[pad] = 1;
    seal(&mut bytes, blocks);
    let place = place();
    fs::write(&place.path, &bytes).unwrap();
    assert!(refusal(open_fully(&place.path)).contains("__pad.4"));
}

#[cfg(any(target_os = "linux", target_vendor = "apple"))]
#[test]
fn a_file_that_is_cut_while_mapped_does_not_end_the_process() {
    for keep in [4096, BLOCK as u64, 3 * BLOCK as u64 + 100] {
        let (place, sample) = (place(), large());
        sample.save(&place.path);
        let (file, other) = (open(&place.path).unwrap(), self::place());
        sample.save(&other.path);
        let sound = open(&other.path).unwrap();
        let codes = file.codes();
        fs::File::options().write(true).open(&place.path).unwrap().set_len(keep).unwrap();
        let wrong = codes.bytes().iter().zip(&sample.codes).filter(|(a, b)| a != b).count();
        assert!(wrong > 0 && file.damaged());
        assert_eq!(codes.bytes().last(), Some(&0));
        refusal(file.verify(&Context::default()));
        assert!(!sound.damaged());
        assert_eq!(sound.codes().bytes(), sample.codes);
    }
}

#[test]
fn a_long_check_can_be_interrupted() {
    let place = place();
    large().save(&place.path);
    let ctx = Context::new(Some(1), 0);
    ctx.cancel();
    assert!(matches!(open(&place.path).unwrap().verify(&ctx), Err(Error::Interrupted)));
}

// ---------------------------------------------------------------- files that are something else

#[test]
fn other_files_get_a_helpful_message() {
    let plain = r#"{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let plain = [&(plain.len() as u64).to_le_bytes(), plain.as_bytes(), &[0; 4]].concat();
    for (bytes, says) in [
        (&b""[..], "is empty"),
        (b"short", "has 5 bytes"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "NumPy array (.npy), not a vqrs table"),
        (b"PK\x03\x04\x00\x00\x00\x00rest of an archive", "zip archive"),
        (b"\x80\x02}q\x00.......................", "pickle"),
        (&[0xff; 100], "states a header"),
        (b"the 0.1 0.2 0.3\nof 0.2 0.1 0.5\n", "not a vqrs table"),
        (&[0; 4096], "the header is not what a table has"),
        (&plain, "a safetensors file without a vqrs description, not a vqrs table: make a table of it"),
    ] {
        let message = refused(bytes);
        assert!(message.contains(says) && message.contains("table.safetensors: "), "{message}");
    }
    let place = place();
    let missing = open(&place.path).err();
    assert!(matches!(missing, Some(Error::Io { path, source })
        if path == place.path && source.kind() == std::io::ErrorKind::NotFound));
    let folder = open(place.folder.path()).err();
    assert!(matches!(folder, Some(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::IsADirectory));
}

#[test]
fn newer_files_name_what_they_need() {
    let bytes = bytes_of(&small());
    let header = header_of(&bytes);
    let edit = |from: &str, to: &str| {
        assert!(header.contains(from), "{from}");
        refused(&with_header(&bytes, &header.replacen(from, to, 1)))
    };
    let message = edit("vqrs-table/1", "vqrs-table/2");
    assert!(message.contains(r#""vqrs-table/2""#) && message.contains(r#""vqrs-table/1""#), "{message}");
    let message = edit(r#"\"requires\":[]"#, r#"\"requires\":[\"magic\",\"wands\"]"#);
    assert!(message.contains("magic, wands"), "{message}");
    assert!(edit(r#"\"requires\":[]"#, r#"\"requires\":[1]"#).contains("list of required features"));
    assert!(edit(r#"\"profile\""#, r#"\"profil\""#).contains("no profile"));
}

// ---------------------------------------------------------------- hostile headers behind right checksums

#[test]
fn hostile_headers_are_refused() {
    let bytes = bytes_of(&small());
    let header = header_of(&bytes);
    // The forge itself works.
    let place = place();
    fs::write(&place.path, with_header(&bytes, &header)).unwrap();
    open_fully(&place.path).unwrap();

    let codes = r#""codes":{"dtype":"U8","shape":[7,3],"data_offsets":[0,21]}"#;
    let pad = r#""__pad.0":{"dtype":"U8","shape":[43],"data_offsets":[21,64]}"#;
    let book = r#""codebooks.0":{"dtype":"F16","shape":[4,3],"data_offsets":[64,88]}"#;
    let cases: &[(&str, &str, &str)] = &[
        // Keys that stand twice, at every level.
        (codes, &format!("{codes},{codes}"), "twice"),
        (r#""format":"pt""#, r#""format":"pt","format":"pt""#, "twice"),
        (r#""dtype":"F32","#, r#""dtype":"F32","dtype":"F32","#, "duplicate field"),
        (r#"\"dim\":3"#, r#"\"dim\":3,\"dim\":4"#, "twice"),
        (r#"\"dim\":3"#, r#"\"x\":[{\"a\":1,\"a\":1}]"#, "twice"),
        (r#"{"__metadata__""#, r#"{"__metadata__":{"vqrs":"{}"},"__metadata__""#, "twice"),
        // Fields that are missing, unknown, or of the wrong type.
        (r#""shape":[7,3],"#, "", "missing field"),
        (r#""shape":[7,3]"#, r#""shape":[7,3],"extra":1"#, "unknown field"),
        (r#"[7,3]"#, r#"[7.0,3]"#, "invalid type"),
        (r#"[7,3]"#, r#"[-7,3]"#, "invalid value"),
        (r#"[0,21]"#, r#"[0,21,22]"#, "trailing characters"),
        (r#"{"dtype":"U8","shape":[7,3],"data_offsets":[0,21]}"#, r#"["U8",[7,3],[0,21]]"#, "invalid type"),
        (r#""origin":"a"#, r#""number":1,"origin":"a"#, "invalid type"),
        (r#""format":"pt""#, r#""format":"tf""#, "expected \"pt\""),
        (r#"{"__metadata__""#, r#"["__metadata__""#, "not what a table has"),
        // Sizes.
        (r#"[7,3]"#, r#"[8,3]"#, "expected"),
        (r#"[7,3]"#, r#"[21]"#, "expected U8 of shape"),
        (r#"[7,3]"#, r#"[7,3,1]"#, "expected U8 of shape"),
        (r#"[7,3]"#, r#"[18446744073709551615,0]"#, "expected"),
        (r#"[7,3]"#, r#"[7,2147483649]"#, "expected U8 of shape"),
        (r#"[7,3]"#, r#"[18446744073709551615,3]"#, "overflow"),
        (r#"[7,3]"#, r#"[6148914691236517205,3]"#, "overflow"),
        (r#"[7,3]"#, r#"[18446744073709551616,3]"#, "invalid"),
        (r#"[4,3]"#, r#"[4294967296,4294967296,4294967296,0]"#, "no values"),
        (r#"[4,3]"#, r#"[1,1,1,1,1,1,1,4,3]"#, "dimensions"),
        (r#"[4,3]"#, r#"[4,4]"#, "expected"),
        (r#"[43]"#, r#"[1,1,1,1,1,1,1,1,43]"#, "dimensions"),
        (r#""dtype":"F16""#, r#""dtype":"F64""#, "do not use"),
        (r#""dtype":"F16""#, r#""dtype":"F32""#, "expected"),
        (r#"{"dtype":"U8","shape":[7,3]"#, r#"{"dtype":"BF16","shape":[7,3]"#, "expected U8 of shape"),
        // Holes, overlaps, order.
        (r#"[0,21]"#, r#"[0,22]"#, "expected"),
        (r#"[64,88]"#, r#"[63,87]"#, "expected"),
        (r#"[64,88]"#, r#"[88,64]"#, "expected"),
        (r#"[64,88]"#, r#"[64,18446744073709551615]"#, "expected"),
        (&format!("{pad},"), "", "expected"),
        (pad, &format!(r#"{pad},"__pad.9":{{"dtype":"U8","shape":[0],"data_offsets":[64,64]}}"#), "expected"),
        (pad, &format!(r#"{pad},"empty":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#), "expected"),
        (&format!("{codes},{pad},{book}"), &format!("{book},{codes},{pad}"), "expected"),
        (&format!("{codes},{pad}"), &format!("{pad},{codes}"), "expected"),
        (r#""__pad.0""#, r#""__pad.70""#, "expected"),
        (r#""__pad.0""#, r#""junk""#, "expected"),
        // Names.
        (r#""codes""#, r#""kodes""#, "expected \"codes\""),
        (r#""vqrs.blocks""#, r#""vqrs.clocks""#, "\"vqrs.blocks\""),
        (r#""mean""#, r#""__mean""#, "reserved"),
        (r#""mean""#, r#""""#, "has a name"),
        (r#""mean""#, r#""vqrs.mean""#, "expected before them"),
        // The description.
        (r#"\"rows\":7"#, r#"\"rows\":8"#, "says 8 for rows, but the codes have 7"),
        (r#"\"rows\":7"#, r#"\"rows\":\"7\""#, "for rows"),
        (r#",\"rows\":7"#, "", "says nothing for rows"),
        (r#"\"row_bytes\":3"#, r#"\"row_bytes\":4"#, "for row_bytes"),
        (r#""vqrs":"{"#, r#""vqrs":"[{"#, "the vqrs description"),
        (r#""vqrs":""#, r#""vqrs":"1"#, "the vqrs description"),
        (r#""vqrs":""#, r#""other":""#, "without a vqrs description"),
    ];
    for (from, to, says) in cases {
        assert!(header.contains(from), "{from} is not in {header}");
        let message = refused(&with_header(&bytes, &header.replacen(from, to, 1)));
        assert!(message.contains(says), "{from} -> {to}\n{message}");
    }
    for (junk, says) in [("\n", "spaces"), ("\t ", "spaces"), ("x", "trailing"), ("{}", "trailing"), ("\0", "trailing")]
    {
        let message = refused(&with_header(&bytes, &format!("{header}{junk}")));
        assert!(message.contains(says), "{message}");
    }
    assert!(refused(&with_header(&bytes, &format!(" {header}"))).contains("byte 0x20"));
    let mut invalid = with_header(&bytes, &header);
    invalid[10] = 0xff;
    assert!(refused(&invalid).contains("not UTF-8 from byte 10"));
}

#[test]
fn a_header_that_is_not_page_aligned_is_refused() {
    let bytes = bytes_of(&small());
    let room = header_length(&bytes);
    let shorter = (room - 64) as u64;
    let moved = [&shorter.to_le_bytes()[..], &bytes[8..8 + room - 64], &bytes[8 + room..]].concat();
    assert!(refused(&moved).contains("multiple of 4096"));
}

#[test]
fn a_header_of_many_tensors_is_refused() {
    let tensors: Vec<String> =
        (0..5000).map(|n| format!(r#""t{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    let text = format!("{{{}}}", tensors.join(","));
    assert!(refused(&[&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()).contains("more than 4096 tensors"));
    let deep = format!(r#"{{"__metadata__":{{"vqrs":"{}"}}}}"#, "[".repeat(1 << 20));
    assert!(refused(&[&(deep.len() as u64).to_le_bytes(), deep.as_bytes()].concat()).contains("65 levels"));
}

/// One change to a file.
#[derive(Clone, Debug)]
enum Change {
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index, usize),
    Insert(prop::sample::Index, Vec<u8>),
    Number(prop::sample::Index, u64),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<prop::sample::Index>;
    let number = prop_oneof![0_u64..200, Just(u64::MAX), Just(1 << 63), any::<u64>()];
    prop_oneof![
        (index(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        (index(), 1_usize..100).prop_map(|(at, count)| Change::Cut(at, count)),
        (index(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, new)| Change::Insert(at, new)),
        (index(), number).prop_map(|(at, new)| Change::Number(at, new)),
    ]
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        match self {
            Change::Set(at, byte) => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Change::Cut(at, count) => {
                let start = at.index(bytes.len());
                bytes.drain(start..bytes.len().min(start + count));
            }
            Change::Insert(at, new) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, new.iter().copied());
            }
            Change::Number(at, new) => {
                // Replaces the first run of digits from a place on.
                let start = at.index(bytes.len());
                let Some(first) = bytes[start..].iter().position(u8::is_ascii_digit).map(|n| start + n) else { return };
                let digits = bytes[first..].iter().take_while(|b| b.is_ascii_digit()).count();
                bytes.splice(first..first + digits, new.to_string().into_bytes());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn changed_files_are_refused(changes in prop::collection::vec(change(), 1..4)) {
        let original = bytes_of(&small());
        let mut bytes = original.clone();
        changes.iter().for_each(|change| change.apply(&mut bytes));
        let place = place();
        fs::write(&place.path, &bytes).unwrap();
        prop_assert_eq!(open_fully(&place.path).is_ok(), bytes == original);
    }

    /// Behind right checksums an edit of the header's text may leave a table that says something else of itself; it
    /// must never be one whose bytes differ.
    #[test]
    fn changed_headers_do_no_harm(changes in prop::collection::vec(change(), 1..4)) {
        let sample = small();
        let bytes = bytes_of(&sample);
        let mut header = header_of(&bytes).into_bytes();
        changes.iter().for_each(|change| change.apply(&mut header));
        prop_assume!(header.len() <= header_length(&bytes));
        let mut forged = bytes.clone();
        let blocks = range_of(&bytes, "vqrs.blocks");
        let room = header_length(&bytes);
        forged[8..8 + room].fill(b' ');
        forged[8..8 + header.len()].copy_from_slice(&header);
        seal(&mut forged, blocks);
        let place = place();
        fs::write(&place.path, &forged).unwrap();
        if let Ok(file) = open(&place.path) {
            file.verify(&Context::new(Some(1), 0)).unwrap();
            prop_assert!(file.codes().bytes() == sample.codes);
            prop_assert_eq!(file.rows() * file.row_bytes(), sample.codes.len());
            // A new name can move the border between decoder tensors and extra ones, but not what they hold.
            let known = sample.tensors.iter().chain(&sample.extra);
            let kept = |(a, b): (&Tensor, &Tensor)| a.data.bytes() == b.data.bytes();
            prop_assert!(file.tensors().iter().zip(known).all(kept));
        }
    }

    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), length in 0_u64..300) {
        let place = place();
        fs::write(&place.path, [&length.to_le_bytes()[..], &bytes].concat()).unwrap();
        prop_assert!(open(&place.path).is_err());
    }
}
