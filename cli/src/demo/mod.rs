//! `demo`: a pair on this machine, shown at work and under faults.
//!
//! One volume holds a real image and is compared with its source; another takes a steady load while the link is cut and
//! each side is frozen and killed, and is compared with what the load's acknowledged writes must have produced; two more
//! show what moves a group to delta mode on a link that works.

mod image;
mod load;
mod modes;
mod process;
mod report;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use understudy_client::proto::{Position, Status, VolumeStatus};
use understudy_client::{Client, ClientConfig, VolumeHandle};
use understudy_common::proxy::Proxy;

use crate::args::{DemoArgs, Global, Usage};
use crate::commands::copy_out::Origin;
use crate::commands::{copy_in, copy_out};
use crate::output::{per_second, print_line, rate, size};
use image::Kind;
use load::Load;
use modes::{HASTE, Transitions};
use process::Service;
use report::Report;

/// Bound of every wait.
const WAIT_LIMIT: Duration = Duration::from_secs(90);
/// How often a state is looked at while waiting.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long the load runs undisturbed before and after a fault, so that there is something to catch up with.
const CALM: Duration = Duration::from_millis(500);
const IMAGE_VOLUME: &str = "image";
const LOAD_VOLUME: &str = "load";
const LOAD_BYTES: u64 = 32 << 20;

pub(crate) async fn run(global: &Global, args: DemoArgs) -> Result<()> {
    if args.image.is_none() && !(image::SIZE_MIN..=16 << 30).contains(&args.size) {
        return Err(Usage("--size must be from 16MiB to 16GiB".to_owned()).into());
    }
    let folder = tempfile::Builder::new().prefix("understudy-demo-").tempdir().context("cannot make a folder")?;
    let report = Report::new(global.json);
    // Whichever way this ends, the play is dropped with its children before anything else happens.
    let (done, interrupted) = tokio::select! {
        done = play(&args, folder.path(), &report) => (done, false),
        name = interruption() => (Err(anyhow!("interrupted by {name}; the services have been ended")), true),
    };
    if args.keep || (done.is_err() && !interrupted) {
        let kept = folder.keep();
        if !global.json {
            print_line(&format!("folder kept: {}", kept.display()))?;
        }
        return done.with_context(|| format!("the demo failed; data and logs are in {}", kept.display()));
    }
    remove(folder.keep()).await?;
    done
}

/// Removes the folder. A thread that was making the image may still add a file or two until it finds its place gone.
async fn remove(folder: PathBuf) -> Result<()> {
    for _ in 0..100 {
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => tokio::time::sleep(LOOK_EVERY).await,
            done => return done.with_context(|| format!("cannot remove {}; remove it by hand", folder.display())),
        }
    }
    bail!("cannot remove {}: files keep appearing in it; remove it by hand", folder.display())
}

async fn interruption() -> &'static str {
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut signals) => signals.recv().await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = wait(SignalKind::interrupt()) => "SIGINT",
        _ = wait(SignalKind::terminate()) => "SIGTERM",
        _ = wait(SignalKind::hangup()) => "SIGHUP",
    }
}

async fn play(args: &DemoArgs, folder: &Path, report: &Report) -> Result<()> {
    let source = prepare_image(args, folder, report).await?;
    let mut stage = Stage::start(folder, source, report).await?;
    stage.copy_image().await?;

    let load_volume = copy_in::create(&stage.primary_client, LOAD_VOLUME, LOAD_BYTES, 4096, Default::default()).await?;
    let mut load = Load::start(&load_volume, &stage.file("expected"))?;
    stage.load_volume = Some(load_volume);
    stage
        .say(
            "load",
            "writing 4 KiB blocks at random, 2,000 a second, while the link is cut and each side is frozen and killed",
            json!({}),
        )
        .await?;
    tokio::time::sleep(CALM).await;

    {
        let transitions = Transitions::follow(&stage.primary_client);
        stage.cut_link(&mut load, &transitions).await?;
        load.pause().await?;
        stage.hot_blocks(&transitions).await?;
        stage.slow_link(&transitions).await?;
        load.resume().await?;
    }
    for fault in [Fault::FreezeBackup, Fault::KillBackup, Fault::FreezePrimary, Fault::KillPrimary] {
        stage.suffer(fault, &mut load).await?;
    }
    let writes = load.writes();
    load.finish().await?;
    stage.finish(writes).await
}

async fn prepare_image(args: &DemoArgs, folder: &Path, report: &Report) -> Result<Source> {
    let (path, kind) = match &args.image {
        Some(path) => (path.clone(), Kind::Given),
        None => {
            let (path, scratch, bytes) = (folder.join("source.img"), folder.join("files"), args.size & !4095);
            let made = path.clone();
            (path, blocking(move || image::make(&made, &scratch, bytes)).await?)
        }
    };
    let bytes = copy_in::file_length(&path)?;
    if bytes == 0 || bytes % 4096 != 0 {
        bail!("{} has {bytes} bytes; give an image of whole blocks of 4096 bytes", path.display());
    }
    let checked = path.clone();
    let clean = blocking(move || image::check(&checked)).await?;
    let (what, files) = match kind {
        Kind::Ext4 { files } => (format!("an ext4 image of {} with {files} files", size(bytes)), Some(files)),
        Kind::Pattern => {
            (format!("mke2fs is not here: a patterned image of {} instead of a file system", size(bytes)), None)
        }
        Kind::Given => (format!("{} of {}", path.display(), size(bytes)), None),
    };
    let kind = if files.is_some() {
        "ext4"
    } else if args.image.is_some() {
        "given"
    } else {
        "pattern"
    };
    report.step("image", None, &format!("source: {what}"), json!({"image": kind, "bytes": bytes, "files": files}))?;
    Ok(Source { path, bytes, clean: clean == Some(true) })
}

struct Source {
    path: PathBuf,
    bytes: u64,
    /// `e2fsck` was run and found nothing: copies must be clean too.
    clean: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    FreezeBackup,
    KillBackup,
    FreezePrimary,
    KillPrimary,
}

/// The pair and what is known about it.
struct Stage<'a> {
    folder: &'a Path,
    report: &'a Report,
    source: Source,
    backup: Service,
    primary: Service,
    /// Between the two.
    link: Proxy,
    primary_client: Client,
    backup_client: Client,
    load_volume: Option<VolumeHandle>,
}

impl<'a> Stage<'a> {
    async fn start(folder: &'a Path, source: Source, report: &'a Report) -> Result<Self> {
        let backup = Service::start("backup", folder, Vec::new()).await?;
        let address = backup.url().trim_start_matches("http://").parse().context("the backup's address")?;
        let link = Proxy::start(address).await.context("cannot make the link")?;
        let mut settings: Vec<_> = vec!["--backup-url".into(), format!("http://{}", link.address()).into()];
        settings.extend(HASTE.map(Into::into));
        let primary = Service::start("primary", folder, settings).await?;
        let (primary_client, backup_client) = (client(&primary.url())?, client(&backup.url())?);
        let text = format!("started a backup at {} and a primary at {}", backup.url(), primary.url());
        let fields = json!({"primary": primary.url(), "backup": backup.url()});
        let stage =
            Self { folder, report, source, backup, primary, link, primary_client, backup_client, load_volume: None };
        stage.until("the backup is attached", || stage.primary_link(true)).await?;
        stage.say("start", &text, fields).await?;
        Ok(stage)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.img"))
    }

    /// A step, with the mode that the image's volume has now.
    async fn say(&self, step: &str, text: &str, fields: serde_json::Value) -> Result<()> {
        let status = self.primary_client.replication().status().await.ok();
        let volume = status.as_ref().and_then(|s| s.volumes.first());
        self.report.step(step, volume, text, fields)
    }

    async fn copy_image(&self) -> Result<()> {
        let volume =
            copy_in::create(&self.primary_client, IMAGE_VOLUME, self.source.bytes, 4096, Default::default()).await?;
        let done = {
            let import = copy_in::import(&volume, &self.source.path, true, |_| {});
            tokio::select! {
                done = import => done?,
                error = self.print_lag(volume.volume().id) => return Err(error),
            }
        };
        let start = Instant::now();
        self.until_acked(volume.volume().id).await?;
        let lag = start.elapsed();
        let text = format!(
            "imported {} in {:.2}s, {}/s; the backup held all of it {:.3}s later",
            size(done.bytes),
            done.time.as_secs_f64(),
            rate(per_second(done.bytes, done.time)),
            lag.as_secs_f64()
        );
        let bytes_per_s = per_second(done.bytes, done.time);
        self.say("import", &text, json!({"bytes": done.bytes, "data_bytes": done.data_bytes, "bytes_per_s": bytes_per_s, "lag_seconds": lag.as_secs_f64()})).await?;
        self.compare(IMAGE_VOLUME, volume.volume().id, &self.source.path).await?;
        let checked = self.check_exports().await?;
        let text = format!("exported from both sides: identical to the source{}", checked.text());
        self.say("compare", &text, json!({"identical": true, "e2fsck": checked.word()})).await
    }

    /// Prints twice a second how far the backup is behind. Ends with an error only.
    async fn print_lag(&self, volume_id: u64) -> anyhow::Error {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let printed = async {
                let status = self.primary_client.replication().status().await?;
                let Some(volume) = of(&status, volume_id) else { return Ok(()) };
                let behind = volume.bytes_at_risk;
                let staging = status.staging.unwrap_or_default();
                let text = format!(
                    "importing: in {}/s, out {}/s, backup {} behind",
                    rate(staging.usage_bytes_per_s),
                    rate(staging.flush_bytes_per_s),
                    size(behind)
                );
                let fields = json!({"bytes_at_risk": behind, "usage_bytes_per_s": staging.usage_bytes_per_s, "flush_bytes_per_s": staging.flush_bytes_per_s});
                self.report.step("importing", Some(volume), &text, fields)
            };
            if let Err(error) = printed.await {
                return error;
            }
        }
    }

    /// One fault under load, its end, and the proof that both sides hold the same again.
    async fn suffer(&mut self, fault: Fault, load: &mut Load) -> Result<()> {
        let before = load.writes();
        let start = Instant::now();
        let step = match fault {
            Fault::FreezeBackup => {
                self.backup.freeze()?;
                self.until("the primary notices the frozen backup", || self.primary_link(false)).await?;
                self.noticed("freeze_backup", "backup frozen (SIGSTOP): the primary saw the link as lost", start)
                    .await?;
                tokio::time::sleep(CALM).await;
                self.backup.thaw()?;
                "thaw_backup"
            }
            Fault::KillBackup => {
                self.backup.kill()?;
                self.until("the primary notices the killed backup", || self.primary_link(false)).await?;
                self.noticed("kill_backup", "backup killed (SIGKILL): the primary saw the link as lost", start).await?;
                tokio::time::sleep(CALM).await;
                self.backup.restart().await?;
                "restart_backup"
            }
            Fault::FreezePrimary => {
                self.primary.freeze()?;
                let noticed = self.until("the backup notices the frozen primary", || self.backup_link(false)).await;
                let text = "primary frozen (SIGSTOP): the backup saw the link as lost";
                let after = start.elapsed().as_secs_f64();
                // Thawed before anything is reported, so that no request of ours waits for a frozen process.
                self.primary.thaw()?;
                noticed?;
                self.report.step(
                    "freeze_primary",
                    None,
                    &format!("{text} after {after:.2}s"),
                    json!({"noticed_seconds": after}),
                )?;
                "thaw_primary"
            }
            Fault::KillPrimary => {
                self.primary.kill()?;
                self.report.step("kill_primary", None, "primary killed (SIGKILL)", json!({}))?;
                self.primary.restart().await?;
                "restart_primary"
            }
        };
        let back = Instant::now();
        self.until("the link is back", || self.primary_link(true)).await?;
        let attached = back.elapsed();
        tokio::time::sleep(CALM).await;
        self.settle(load).await?;
        let writes = load.writes() - before;
        let text = format!(
            "link back after {:.2}s; {writes} writes acknowledged since the fault began, none lost; both sides identical",
            attached.as_secs_f64()
        );
        self.say(step, &text, json!({"attached_seconds": attached.as_secs_f64(), "writes": writes, "identical": true}))
            .await?;
        load.resume().await?;
        tokio::time::sleep(CALM).await;
        Ok(())
    }

    async fn noticed(&self, step: &str, text: &str, start: Instant) -> Result<()> {
        let after = start.elapsed().as_secs_f64();
        self.say(step, &format!("{text} after {after:.2}s"), json!({"noticed_seconds": after})).await
    }

    /// Holds the load, waits until the backup has everything, compares both sides with what was acknowledged.
    async fn settle(&self, load: &mut Load) -> Result<()> {
        let pause = tokio::time::timeout(WAIT_LIMIT, load.pause());
        pause.await.map_err(|_| anyhow!("the load's writes were not all acknowledged within {WAIT_LIMIT:?}"))??;
        let volume = self.load_volume.as_ref().context("the load has no volume")?;
        volume.flush().await?;
        self.until_acked(volume.volume().id).await?;
        self.compare(LOAD_VOLUME, volume.volume().id, &self.file("expected")).await
    }

    async fn finish(&self, writes: u64) -> Result<()> {
        let volume = self.load_volume.as_ref().context("the load has no volume")?;
        volume.flush().await?;
        self.until_acked(volume.volume().id).await?;
        self.compare(LOAD_VOLUME, volume.volume().id, &self.file("expected")).await?;
        let image = self.primary_client.volume(IMAGE_VOLUME).await?;
        self.compare(IMAGE_VOLUME, image.volume().id, &self.source.path).await?;
        let checked = self.check_exports().await?;
        let text = format!(
            "both volumes identical on both sides after 2 freezes and 2 kills, {writes} writes of load{}",
            checked.text()
        );
        let seconds = self.report.seconds();
        let fields = json!({"identical": true, "e2fsck": checked.word(), "bytes": self.source.bytes, "writes": writes, "seconds": seconds});
        self.report.last(&text, fields)
    }

    /// Exports `volume` from both sides and compares both with `expected`, byte for byte. The backup may need a moment
    /// to apply what it has acknowledged; an image of the right position that differs is an error at once.
    async fn compare(&self, volume: &str, id: u64, expected: &Path) -> Result<()> {
        let target = self.primary_client.replication().status().await?;
        let target = of(&target, id).and_then(|v| v.position).and_then(|p| p.durable).map(key).unwrap_or_default();
        let (ours, theirs) = (self.file(&format!("{volume}-primary")), self.file(&format!("{volume}-backup")));
        copy_out::export(Origin::Primary(&self.primary_client), volume, &ours, |_, _| {}).await?;
        if let Some(at) = difference(expected, &ours).await? {
            bail!("volume {volume} on the primary differs from what was acknowledged at byte {at}");
        }
        let start = Instant::now();
        loop {
            let done = copy_out::export(Origin::Backup(&self.backup_client), volume, &theirs, |_, _| {}).await;
            let position = match done {
                Ok(done) => {
                    let Some(at) = difference(expected, &theirs).await? else { return Ok(()) };
                    let position = done.position.map(key).unwrap_or_default();
                    if position >= target {
                        bail!(
                            "volume {volume} on the backup, at position {position:?}, differs from the primary's at byte {at}"
                        );
                    }
                    format!("{position:?}")
                }
                Err(error) => format!("{error:#}"),
            };
            if start.elapsed() > WAIT_LIMIT {
                bail!("the backup's image of {volume} did not reach {target:?} within {WAIT_LIMIT:?}: {position}");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// File system checks of the exported images, where the source passes one.
    async fn check_exports(&self) -> Result<Checked> {
        if !self.source.clean {
            return Ok(Checked(false));
        }
        for side in ["primary", "backup"] {
            let path = self.file(&format!("{IMAGE_VOLUME}-{side}"));
            if blocking(move || image::check(&path)).await? != Some(true) {
                bail!("e2fsck -fn finds errors in the image exported from the {side}, and none in its source");
            }
        }
        Ok(Checked(true))
    }

    async fn primary_link(&self, attached: bool) -> Result<bool> {
        Ok(link_is(&self.primary_client.replication().status().await?, attached))
    }

    async fn backup_link(&self, attached: bool) -> Result<bool> {
        Ok(link_is(&self.backup_client.backup().status().await?, attached))
    }

    /// Asked after the last answer, `durable` covers every acknowledged write of the volume.
    async fn until_acked(&self, id: u64) -> Result<()> {
        self.until("the backup has acknowledged everything", || async move {
            let status = self.primary_client.replication().status().await?;
            let position = of(&status, id).and_then(|v| v.position).unwrap_or_default();
            let durable = position.durable.map(key).unwrap_or_default();
            Ok(position.acked.map(key).unwrap_or_default() >= durable)
        })
        .await
    }

    async fn until<F: Future<Output = Result<bool>>>(&self, what: &str, look: impl Fn() -> F) -> Result<()> {
        let start = Instant::now();
        loop {
            let last = match look().await {
                Ok(true) => return Ok(()),
                Ok(false) => String::new(),
                Err(error) => format!(": {error:#}"),
            };
            if start.elapsed() > WAIT_LIMIT {
                bail!("waited {WAIT_LIMIT:?} in vain until {what}{last}");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Whether `e2fsck` was run; a failure is an error before this.
#[derive(Clone, Copy)]
struct Checked(bool);

impl Checked {
    fn word(self) -> &'static str {
        if self.0 { "clean" } else { "not run" }
    }

    fn text(self) -> &'static str {
        if self.0 { ", and clean for e2fsck -fn" } else { "" }
    }
}

fn client(url: &str) -> Result<Client> {
    let mut config = ClientConfig::new(url);
    config.retry_for = Duration::from_secs(20);
    Ok(Client::lazy(config)?)
}

fn link_is(status: &Status, attached: bool) -> bool {
    status.link.as_ref().is_some_and(|link| (link.state == "attached") == attached)
}

fn of(status: &Status, volume_id: u64) -> Option<&VolumeStatus> {
    status.volumes.iter().find(|v| v.id == volume_id)
}

fn key(position: Position) -> (u64, u64) {
    (position.generation, position.lsn)
}

async fn difference(one: &Path, other: &Path) -> Result<Option<u64>> {
    let (one, other) = (one.to_owned(), other.to_owned());
    blocking(move || Ok(image::first_difference(&one, &other)?)).await
}

/// Work on files, off the thread that serves the network.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}
