//! `write` and `read`: bytes at an offset.

use std::io::{Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use serde_json::json;
use tokio::sync::mpsc;
use understudy_client::{Content, Written};

use crate::args::{Global, ReadArgs, Usage, WriteArgs};
use crate::commands::copy_in::CHUNK_BYTES;
use crate::convert;
use crate::output::{print_json, print_line, size};

pub(crate) async fn write(global: &Global, args: WriteArgs) -> Result<()> {
    let volume = global.primary_client()?.volume(&args.volume).await?;
    let mut chunks = read_file(args.file.clone())?;
    let stream = volume.write_stream();
    let mut at = args.offset;
    // Only the last answer is shown; any refusal ends the command.
    let (pending, mut answers) = mpsc::channel(1024);
    let collect = tokio::spawn(async move {
        let mut last: Option<Written> = None;
        while let Some(write) = answers.recv().await {
            last = Some(understudy_client::PendingWrite::into_future(write).await?);
        }
        anyhow::Ok(last)
    });
    while let Some(chunk) = chunks.recv().await {
        let chunk = chunk.with_context(|| format!("cannot read {}", args.file.display()))?;
        let length = chunk.len() as u64;
        if pending.send(stream.write(at, chunk).await?).await.is_err() {
            break;
        }
        at = at.checked_add(length).ok_or_else(|| Usage("the bytes end above 2^64".to_owned()))?;
    }
    drop(pending);
    let last = collect.await??;
    stream.finish().await?;
    volume.flush().await?;
    let bytes = at - args.offset;
    if global.json {
        return print_json(&json!({
            "volume": args.volume,
            "offset_bytes": args.offset,
            "bytes": bytes,
            "position": convert::position(last.map(|w| w.position)),
            "mode": last.map(|w| convert::mode(w.mode)),
            "durability": last.map(|w| convert::durability(w.durability)),
        }));
    }
    let durability = last.map_or("nothing to write", |w| convert::durability(w.durability));
    print_line(&format!("wrote {} to {} at {} ({durability})", size(bytes), args.volume, args.offset))
}

/// The chunks of a file or of standard input, read on a thread of their own.
fn read_file(path: std::path::PathBuf) -> Result<mpsc::Receiver<std::io::Result<Bytes>>> {
    let mut input: Box<dyn std::io::Read + Send> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(&path).with_context(|| format!("cannot open {}", path.display()))?)
    };
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        loop {
            let mut chunk = Vec::with_capacity(CHUNK_BYTES);
            let read = input.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut chunk);
            match read {
                Ok(0) => return,
                Ok(_) if sender.blocking_send(Ok(chunk.into())).is_err() => return,
                Ok(_) => {}
                Err(error) => {
                    let _ = sender.blocking_send(Err(error));
                    return;
                }
            }
        }
    });
    Ok(receiver)
}

pub(crate) async fn read(global: &Global, args: ReadArgs) -> Result<()> {
    let to_stdout = args.file == Path::new("-");
    if global.json && to_stdout {
        return Err(Usage("read --json needs --file FILE: standard output is for the JSON".to_owned()).into());
    }
    let end = args.offset.checked_add(args.length).ok_or_else(|| Usage("the range ends above 2^64".to_owned()))?;
    let primary = global.primary_client()?;
    let mut stream = if args.from_backup {
        global.backup_client()?.backup().read_stream(&args.volume, args.offset..end)
    } else {
        primary.volume(&args.volume).await?.read_stream(args.offset..end)
    };
    let mut out: Box<dyn std::io::Write> = if to_stdout {
        Box::new(std::io::stdout().lock())
    } else {
        Box::new(std::fs::File::create(&args.file).with_context(|| format!("cannot create {}", args.file.display()))?)
    };
    let mut position = None;
    while args.length > 0
        && let Some(chunk) = stream.next().await?
    {
        position = Some(chunk.position);
        match chunk.content {
            Content::Data(data) => out.write_all(&data)?,
            Content::Zeros(count) => {
                std::io::copy(&mut std::io::repeat(0).take(count), &mut out)?;
            }
        }
    }
    out.flush()?;
    if global.json {
        return print_json(&json!({
            "volume": args.volume,
            "offset_bytes": args.offset,
            "bytes": args.length,
            "file": args.file,
            "position": convert::position(position),
        }));
    }
    Ok(())
}
