//! Any text as the description of a table, up to the first zero byte; any tensors, a line each (`NAME TYPE 2 3`), up to
//! the second one; their bytes. All else is right.
#![no_main]

const TYPES: [(&str, usize); 6] = [("U8", 1), ("I8", 1), ("U64", 8), ("F16", 2), ("BF16", 2), ("F32", 4)];
const MOST_BYTES: usize = 1 << 16;

fn spec(line: &str) -> Option<vqrs_fuzz::Spec<'_>> {
    let mut words = line.split(' ');
    let name = words.next()?;
    let dtype = words.next()?;
    let (dtype, size) = *TYPES.iter().find(|(name, _)| *name == dtype)?;
    let shape: Option<Vec<usize>> = words.map(|word| word.parse().ok()).collect();
    let bytes = shape.as_ref()?.iter().try_fold(size, |bytes, n| bytes.checked_mul(*n))?;
    (bytes <= MOST_BYTES).then_some((name, dtype, size, shape?))
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(3, |byte| *byte == 0);
    let mut text = || parts.next().and_then(|part| std::str::from_utf8(part).ok());
    let (Some(description), Some(tensors)) = (text(), text()) else { return };
    let Some(tensors) = tensors.lines().map(spec).collect::<Option<Vec<_>>>() else { return };
    if description.len() > 6000 || tensors.len() > 40 {
        return;
    }
    vqrs_fuzz::open(&vqrs_fuzz::made(description, &tensors, parts.next().unwrap_or_default()));
});
