//! Real processes: killed, cut off, misconfigured, given foreign or damaged files.
//!
//! `UNDERSTUDY_BIN_DIR` names the binaries to test, `UNDERSTUDY_SEED` replays a run of the rounds,
//! `UNDERSTUDY_ROUNDS` makes it longer.

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rand::{Rng as _, SeedableRng as _, seq::SliceRandom as _};
use rand_pcg::Pcg64Mcg;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use understudy_common::proxy::Link;
use understudy_proto::v1::{
    self, AckRule, AwayRule, block_service_client::BlockServiceClient,
    replication_service_client::ReplicationServiceClient,
};
use understudy_tests::process::{
    Node, PATIENCE, Role,
    alone::{Alone, EXIT_STORAGE, refuses_to_start},
    load::{self, BLOCK_BYTES, BLOCKS_PER_WRITER, Load},
    pair::Pair,
    seed, service,
};

const EXIT_BAD_CONFIGURATION: i32 = 64;

/// Enough for every developer's run; CI asks for 50 with `UNDERSTUDY_ROUNDS`.
const ROUNDS: u32 = 6;
const WRITERS_PER_VOLUME: usize = 4;

#[tokio::test(flavor = "multi_thread")]
async fn rounds_of_sigkill_lose_nothing() -> Result<()> {
    let seed = seed(1);
    let rounds = std::env::var("UNDERSTUDY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let volumes = [("staged", AckRule::Staged), ("both", AckRule::Both)];
    let mut pair = Pair::start().await?;
    for (name, ack) in volumes {
        pair.create_volume(name, (WRITERS_PER_VOLUME * BLOCKS_PER_WRITER) as u64, ack, AwayRule::Degrade).await?;
    }
    let mut load = Load::start(seed, &volumes.map(|(name, _)| name), WRITERS_PER_VOLUME);
    load.serve(Some(pair.node(Role::Primary)?.channel()?));

    for round in 0..rounds {
        round_of_faults(&mut pair, &mut load, &mut rng).await.with_context(|| format!("seed {seed}, round {round}"))?;
    }

    pair.link.set(Link::Open);
    load.progress(100, Duration::from_secs(5)).await?;
    let acks = load.acks();
    let expected = load.finish().await.with_context(|| format!("seed {seed}"))?;
    pair.wait_caught_up().await.with_context(|| format!("seed {seed}"))?;
    for (number, (name, _)) in volumes.iter().enumerate() {
        let image = pair.read_image(Role::Primary, name).await?;
        ensure!(image == pair.read_image(Role::Backup, name).await?, "seed {seed}: the images of {name} differ");
        ensure!(image.len() == expected[number].len() * BLOCK_BYTES, "the image of {name} has {} bytes", image.len());
        for (block, (content, cell)) in image.chunks(BLOCK_BYTES).zip(&expected[number]).enumerate() {
            cell.check(number, block, content).with_context(|| format!("seed {seed}"))?;
        }
    }
    println!("{rounds} rounds, {acks} acknowledged writes: images identical and as expected");
    Ok(())
}

/// Sets the link, lets some writes through, kills one side or both, and starts what was killed.
async fn round_of_faults(pair: &mut Pair, load: &mut Load, rng: &mut Pcg64Mcg) -> Result<()> {
    let link = match rng.random_range(0..4) {
        0 => Link::Open,
        1 => Link::Cut,
        2 => Link::Frozen,
        _ => Link::Slow(1 << rng.random_range(14..20)),
    };
    pair.link.set(link);
    load.progress(rng.random_range(1..400), Duration::from_secs(1)).await?;

    let mut victims = match rng.random_range(0..3) {
        0 => vec![Role::Primary],
        1 => vec![Role::Backup],
        _ => vec![Role::Primary, Role::Backup],
    };
    victims.shuffle(rng);
    for &victim in &victims {
        pair.kill(victim);
    }
    if victims.contains(&Role::Primary) {
        load.serve(None);
    }
    // A link that comes back before the sides, after them, or in the next round.
    if rng.random_ratio(1, 3) {
        pair.link.set(Link::Open);
    }
    victims.shuffle(rng);
    for &victim in &victims {
        pair.restart(victim).await?;
    }
    if victims.contains(&Role::Primary) {
        load.serve(Some(pair.node(Role::Primary)?.channel()?));
    }
    if rng.random_ratio(1, 2) {
        pair.link.set(Link::Open);
    }
    Ok(())
}

#[test]
fn every_bad_setting_is_named() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("primary.toml");
    let data_dir = directory.path().join("primary");
    fs::write(
        &config,
        format!(
            "data_dir = {data_dir:?}\nadmin_listen = \"nowhere\"\n\
             [staging]\ncapacity = \"plenty\"\n\
             [link]\ntimeout = \"soon\"\nheartbeat = \"often\"\n\
             [backup]\nurl = \"not a url\"\n"
        ),
    )?;
    let output = service(Role::Primary).arg("--config").arg(&config).output()?;
    let message = String::from_utf8_lossy(&output.stderr).replace('-', "_");
    assert_eq!(output.status.code(), Some(EXIT_BAD_CONFIGURATION), "{message}");
    for (setting, value) in [
        ("admin_listen", "nowhere"),
        ("capacity", "plenty"),
        ("timeout", "soon"),
        ("heartbeat", "often"),
        ("url", "not a url"),
    ] {
        assert!(
            message.contains(setting) && message.contains(value),
            "{setting} = {value} is not named in:\n{message}"
        );
    }
    assert!(!data_dir.exists(), "a bad configuration touched the disk");
    Ok(())
}

#[tokio::test]
async fn second_process_on_a_directory_is_refused() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let first = Alone::start(directory.path(), "node", &[]).await?;
    let mut second = Node::spawn(Role::Primary, &directory.path().join("node"), &[])?;
    let status = second.wait_exit().await?;
    assert!(matches!(status.code(), Some(EXIT_BAD_CONFIGURATION | EXIT_STORAGE)), "{status}\n{}", second.log_tail());
    first.write(0, 1).await?;
    Ok(())
}

#[tokio::test]
async fn sigterm_ends_an_open_stream_and_keeps_what_it_acknowledged() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut alone = Alone::start(directory.path(), "node", &[]).await?;
    let (requests, outgoing) = mpsc::channel(4);
    let write = |tag: u64| v1::WriteBlocksRequest { tag, write: Some(alone.request(tag, tag)) };
    requests.send(write(1)).await?;
    let mut client = BlockServiceClient::new(alone.node.channel()?);
    let mut answers = client.write_blocks(ReceiverStream::new(outgoing)).await?.into_inner();
    let answer = answers.message().await?.context("an answer")?;
    assert!(matches!(answer.results[0].outcome, Some(v1::write_result::Outcome::Written(_))), "{answer:?}");

    alone.node.terminate()?;
    // `requests` is still open: only the service can end this stream.
    let status = alone.node.wait_exit().await?;
    assert_eq!(status.code(), Some(0), "{}", alone.node.log_tail());
    assert!(!matches!(answers.message().await, Ok(Some(_))), "an answer nobody asked for");
    drop(requests);

    let alone = Alone::reopen(directory.path(), "node", &[]).await?;
    assert_eq!(alone.read(1).await?, load::fill(0, 1, 1));
    Ok(())
}

/// The kept events behind number `after`, up to one of `kind`.
async fn events_up_to(alone: &Alone, after: u64, kind: &str) -> Result<Vec<(u64, String)>> {
    let mut client = ReplicationServiceClient::new(alone.node.channel()?);
    let mut answers = client.watch_events(v1::WatchEventsRequest { after }).await?.into_inner();
    let mut events = Vec::new();
    while let Some(event) = tokio::time::timeout(PATIENCE, answers.message()).await?? {
        events.push((event.number, event.kind));
        if events.last().is_some_and(|(_, last)| last == kind) {
            return Ok(events);
        }
    }
    bail!("the stream ended; events so far: {events:?}")
}

#[tokio::test]
async fn events_survive_sigkill_and_an_end_in_order() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut alone = Alone::start(directory.path(), "node", &[]).await?;
    // They are written behind the answers.
    let file = directory.path().join("node/events.jsonl");
    let deadline = Instant::now() + PATIENCE;
    while !fs::read_to_string(&file)?.contains("volume.created") {
        ensure!(Instant::now() < deadline, "the event was not written within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    alone.node.kill()?;

    let mut alone = Alone::reopen(directory.path(), "node", &[]).await?;
    let events = events_up_to(&alone, 1, "node.started").await?;
    assert_eq!(events[0], (2, "volume.created".into()));
    let (restarted, _) = events[1];
    assert!(events.len() == 2 && restarted > 3, "numbers that may have been shown were given again: {events:?}");
    alone.node.terminate()?;
    ensure!(alone.node.wait_exit().await?.success(), "{}", alone.node.log_tail());

    let alone = Alone::reopen(directory.path(), "node", &[]).await?;
    let events = events_up_to(&alone, restarted, "node.started").await?;
    assert_eq!(events, [(restarted + 1, "node.ended".into()), (restarted + 2, "node.started".into())]);
    Ok(())
}

#[tokio::test]
async fn device_of_another_directory_is_refused() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut devices = Vec::new();
    for name in ["mine", "foreign"] {
        let mut alone = Alone::start(directory.path(), name, &[]).await?;
        alone.write(0, 1).await?;
        devices.push(alone.device().await?);
        alone.node.terminate()?;
        ensure!(alone.node.wait_exit().await?.success(), "{}", alone.node.log_tail());
    }
    fs::copy(&devices[1], &devices[0])?;
    refuses_to_start(&directory.path().join("mine"), &[], &[&file_name(&devices[0])?, "device"]).await
}

#[tokio::test]
async fn missing_device_is_refused() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut alone = Alone::start(directory.path(), "node", &[]).await?;
    alone.write(0, 1).await?;
    let device = alone.device().await?;
    alone.node.terminate()?;
    ensure!(alone.node.wait_exit().await?.success(), "{}", alone.node.log_tail());
    fs::remove_file(&device)?;
    refuses_to_start(&directory.path().join("node"), &[], &[&file_name(&device)?]).await?;
    assert!(!device.exists(), "an empty device was made in the place of the missing one");
    Ok(())
}

#[tokio::test]
async fn swapped_devices_are_refused_until_they_are_in_order() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name).display().to_string();
    let devices = |first: &str, second: &str| format!("{}=16MiB,{}=16MiB", path(first), path(second));
    let (in_order, swapped) = (devices("a", "b"), devices("b", "a"));
    let mut alone = Alone::start(directory.path(), "node", &["--pool-devices", &in_order]).await?;
    alone.write(0, 1).await?;
    alone.node.terminate()?;
    ensure!(alone.node.wait_exit().await?.success(), "{}", alone.node.log_tail());
    let words = [path("b"), "order".to_owned()];
    let data_dir = directory.path().join("node");
    refuses_to_start(&data_dir, &["--pool-devices", &swapped], &words.each_ref().map(String::as_str)).await?;

    let alone = Alone::reopen(directory.path(), "node", &["--pool-devices", &in_order]).await?;
    assert_eq!(alone.read(0).await?, load::fill(0, 0, 1));
    Ok(())
}

#[tokio::test]
async fn journal_corrupted_in_the_middle_is_refused_and_says_where() -> Result<()> {
    const WRITES: u64 = 400;
    let directory = tempfile::tempdir()?;
    let mut alone = Alone::start(directory.path(), "node", &[]).await?;
    for number in 0..WRITES {
        alone.write(number % 64, number + 1).await?;
    }
    alone.node.kill()?;
    // A record that is synced, not checkpointed yet, and followed by others.
    let damaged = WRITES - 10;
    let content = load::fill(0, usize::try_from((damaged - 1) % 64)?, damaged);
    let (file, offset) = find_in_journal(&directory.path().join("node/journal"), &content)?;
    flip_byte(&file, offset + 1000)?;
    refuses_to_start(&directory.path().join("node"), &[], &["journal", &file_name(&file)?]).await?;

    // The byte was all that was wrong.
    flip_byte(&file, offset + 1000)?;
    let alone = Alone::reopen(directory.path(), "node", &[]).await?;
    for block in 0..64 {
        let last = (1..=WRITES).rev().find(|stamp| (stamp - 1) % 64 == block).context("written")?;
        assert_eq!(alone.read(block).await?, load::fill(0, usize::try_from(block)?, last), "block {block}");
    }
    Ok(())
}

/// File and offset of a place in the journal that holds `content`.
fn find_in_journal(directory: &Path, content: &[u8]) -> Result<(PathBuf, u64)> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            if let Ok(found) = find_in_journal(&path, content) {
                return Ok(found);
            }
        } else if let Some(at) = fs::read(&path)?.windows(content.len()).position(|window| window == content) {
            return Ok((path, at as u64));
        }
    }
    bail!("{} does not hold the write", directory.display())
}

fn flip_byte(path: &Path, offset: u64) -> Result<()> {
    let file = fs::File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 0x40], offset)?;
    Ok(())
}

fn file_name(path: &Path) -> Result<String> {
    Ok(path.file_name().context("no file name")?.to_string_lossy().into_owned())
}
