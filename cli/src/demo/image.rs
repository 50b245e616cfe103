//! The image to copy, and the means to check a copy of it.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;

/// Smallest image made here.
pub(super) const SIZE_MIN: u64 = 16 << 20;
/// Journal and inode tables of a small file system.
const OVERHEAD_BYTES: u64 = 6 << 20;

/// What the image is made of.
#[derive(Debug)]
pub(super) enum Kind {
    /// A file system with so many files.
    Ext4 { files: u32 },
    /// Patterned blocks: no `mke2fs` here.
    Pattern,
    /// The user's own.
    Given,
}

/// Makes an image of `size` bytes at `path`: ext4 with real files where `mke2fs` exists.
pub(super) fn make(path: &Path, scratch: &Path, size: u64) -> Result<Kind> {
    match tool("mke2fs") {
        Some(mke2fs) => {
            let files = make_files(scratch, size.saturating_sub(OVERHEAD_BYTES) / 2)
                .context("cannot make the files of the image")?;
            make_ext4(&mke2fs, path, scratch, size)?;
            std::fs::remove_dir_all(scratch).context("cannot remove the files of the image")?;
            Ok(Kind::Ext4 { files })
        }
        None => {
            make_pattern(path, size).context("cannot write the image")?;
            Ok(Kind::Pattern)
        }
    }
}

/// Files of mixed sizes, most of them small, about `budget` bytes in all.
fn make_files(folder: &Path, budget: u64) -> std::io::Result<u32> {
    let mut rng = Pcg64Mcg::seed_from_u64(1);
    std::fs::create_dir(folder)?;
    let (mut used, mut files) = (0, 0);
    let mut data = vec![0; 1 << 20];
    while used < budget && files < 4000 {
        let size = match rng.random_range(0..1000) {
            0..800 => rng.random_range(0..4096),
            800..970 => rng.random_range(4096..32_768),
            970..997 => rng.random_range(32_768..262_144),
            _ => rng.random_range(262_144..1 << 20),
        };
        let size = usize::try_from((budget - used).min(size)).unwrap_or(0);
        if files % 3 == 0 {
            // Text-like: the same line again and again, with a number.
            let line = format!("file {files}: the understudy learns the part of the lead\n").into_bytes();
            for (byte, letter) in data[..size].iter_mut().zip(line.iter().cycle()) {
                *byte = *letter;
            }
        } else {
            rng.fill_bytes(&mut data[..size]);
        }
        let outer = folder.join(format!("d{:02}", files % 12));
        let place = outer.join(format!("s{}", files % 5));
        // Not with all parents: when the demo is interrupted, the folder goes away and must not come back.
        for made in [&outer, &place].into_iter().filter(|made| !made.is_dir()) {
            std::fs::create_dir(made)?;
        }
        File::create(place.join(format!("file-{files}")))?.write_all(&data[..size])?;
        // A file takes whole blocks and an inode.
        used += (size as u64).next_multiple_of(4096) + 256;
        files += 1;
    }
    Ok(files)
}

fn make_ext4(mke2fs: &Path, path: &Path, folder: &Path, size: u64) -> Result<()> {
    let output = Command::new(mke2fs)
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-i", "8192", "-E", "lazy_itable_init=0", "-d"])
        .arg(folder)
        .arg(path)
        .arg((size / 4096).to_string())
        .output()
        .with_context(|| format!("cannot run {}", mke2fs.display()))?;
    if !output.status.success() {
        bail!("mke2fs failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Every other 64 KiB numbered blocks, the rest zeros.
fn make_pattern(path: &Path, size: u64) -> std::io::Result<()> {
    let file = File::create(path)?;
    file.set_len(size)?;
    for at in (0..size).step_by(4096).filter(|at| at / 65_536 % 2 == 0) {
        let mut block = [0; 4096];
        for (index, word) in block.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = (at + index as u64).to_le_bytes();
        }
        let length = usize::try_from(size - at).unwrap_or(block.len()).min(block.len());
        file.write_all_at(&block[..length], at)?;
    }
    Ok(())
}

/// A read-only check of a file system. `None`: there is no ext file system in it, or no `e2fsck` here.
pub(super) fn check(path: &Path) -> Result<Option<bool>> {
    let mut magic = [0; 2];
    let is_ext = File::open(path)?.read_exact_at(&mut magic, 1080).is_ok() && magic == [0x53, 0xef];
    let Some(e2fsck) = tool("e2fsck").filter(|_| is_ext) else { return Ok(None) };
    let output = Command::new(&e2fsck).arg("-fn").arg(path).output();
    Ok(Some(output.with_context(|| format!("cannot run {}", e2fsck.display()))?.status.success()))
}

/// The first byte in which two files differ; the end of the shorter where one continues the other.
pub(super) fn first_difference(one: &Path, other: &Path) -> std::io::Result<Option<u64>> {
    let (files, lengths) = {
        let (a, b) = (File::open(one)?, File::open(other)?);
        let lengths = (a.metadata()?.len(), b.metadata()?.len());
        ((a, b), lengths)
    };
    let common = lengths.0.min(lengths.1);
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < common {
        let take = usize::try_from(common - at).unwrap_or(left.len()).min(left.len());
        files.0.read_exact_at(&mut left[..take], at)?;
        files.1.read_exact_at(&mut right[..take], at)?;
        if left[..take] != right[..take] {
            let index = left[..take].iter().zip(&right[..take]).position(|(a, b)| a != b).unwrap_or(0);
            return Ok(Some(at + index as u64));
        }
        at += take as u64;
    }
    Ok((lengths.0 != lengths.1).then_some(common))
}

/// System tools are often outside a user's PATH.
fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn difference_is_the_first_byte_that_differs() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, data: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, data).unwrap();
            path
        };
        let mut data = vec![7; (1 << 20) + 10];
        let one = file("one", &data);
        assert_eq!(first_difference(&one, &one).unwrap(), None);
        data[(1 << 20) + 3] = 8;
        assert_eq!(first_difference(&one, &file("two", &data)).unwrap(), Some((1 << 20) + 3));
        assert_eq!(first_difference(&one, &file("three", &[7; 100])).unwrap(), Some(100));
    }

    #[test]
    fn made_image_is_a_clean_file_system_where_the_tools_exist() {
        let folder = tempfile::tempdir().unwrap();
        let (image, scratch) = (folder.path().join("image"), folder.path().join("files"));
        let kind = make(&image, &scratch, SIZE_MIN).unwrap();
        assert_eq!(std::fs::metadata(&image).unwrap().len(), SIZE_MIN);
        match kind {
            Kind::Ext4 { files } => {
                assert!(files > 10);
                assert_ne!(check(&image).unwrap(), Some(false));
            }
            _ => assert_eq!(check(&image).unwrap(), None),
        }
    }
}
