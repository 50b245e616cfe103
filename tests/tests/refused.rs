//! Requests that are to be refused, by the command line against real processes: one line that says what to do, exit code
//! 1, and nothing is lost.
//!
//! `UNDERSTUDY_BIN_DIR` names the binaries to test.

use std::{
    process::Output,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use understudy_common::proxy::Link;
use understudy_proto::v1::{self, AckRule, AwayRule};
use understudy_tests::process::{PATIENCE, Role, bin_dir, duo::Duo, load};

const VOLUME: &str = "data";

/// A pair, as the command line reaches it.
struct Scene {
    duo: Duo,
}

impl Scene {
    async fn start() -> Result<Self> {
        let duo = Duo::start().await?;
        duo.create_volume(0, VOLUME, 64, AckRule::Staged, AwayRule::Degrade).await?;
        duo.write(0, VOLUME, 1, 1).await?;
        duo.until_joined(0).await?;
        Ok(Self { duo })
    }

    fn url(&self, node: usize) -> Result<String> {
        let address = self.duo.node(node)?.grpc;
        Ok(format!("http://{}", address.expect("it is ready")))
    }

    /// Refused, with each of `words` in one line.
    async fn refused(&self, urls: &[&str], args: &[&str], words: &[&str]) -> Result<()> {
        let output = understudy(urls, args).await?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{args:?}: {}, {errors}", output.status);
        ensure!(errors.lines().count() == 1, "{args:?}: not one line: {errors}");
        for word in words {
            ensure!(errors.contains(word), "{args:?}: {word:?} is not in {errors}");
        }
        Ok(())
    }

    /// The pair goes on with what it had.
    async fn goes_on(&self, primary: usize, stamp: u64) -> Result<()> {
        ensure!(self.duo.read(primary, VOLUME, 1).await? == load::fill(0, 1, 1), "a block is lost");
        self.duo.write(primary, VOLUME, 2, stamp).await?;
        self.duo.until_joined(primary).await?;
        self.duo.identical(primary, VOLUME).await.map(drop)
    }
}

async fn understudy(urls: &[&str], args: &[&str]) -> Result<Output> {
    let mut command = std::process::Command::new(bin_dir().join("understudy"));
    command.args(["--retry-for", "500ms"]);
    for (flag, url) in ["--primary", "--backup"].iter().zip(urls) {
        command.args([flag, url]);
    }
    command.args(args);
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_nothing_to_act_on_changes_nothing() -> Result<()> {
    let scene = Scene::start().await?;
    let urls = [scene.url(0)?, scene.url(1)?];
    let urls = urls.each_ref().map(String::as_str);
    scene.refused(&urls, &["resolve", "--discard", "primary"], &["nothing to resolve", "understudy demote"]).await?;
    scene.refused(&urls, &["resolve", "--discard", "backup"], &["nothing to resolve"]).await?;
    scene.refused(&urls, &["promote"], &["the primary is attached", "force the promotion"]).await?;
    scene.refused(&urls, &["promote", "--generation", "9", "--force"], &["generation 9 was expected"]).await?;
    scene.goes_on(0, 2).await?;
    scene.refused(&urls, &["snapshot", "restore", "data@never"], &["never", "ListSnapshots"]).await?;
    scene.refused(&urls, &["snapshot", "delete", "data@never"], &["never", "ListSnapshots"]).await?;
    for node in [0, 1] {
        let dir = scene.duo.data_dir(node).display().to_string();
        scene.refused(&urls, &["inspect", &dir], &["in use by process", "stop it"]).await?;
        scene.refused(&urls, &["demote", "--dir", &dir], &["in use by process", "stop it"]).await?;
    }
    scene.goes_on(0, 3).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_the_other_side_says_that_it_is_away() -> Result<()> {
    let mut scene = Scene::start().await?;
    let urls = [scene.url(0)?, scene.url(1)?];
    let urls = urls.each_ref().map(String::as_str);
    // It answers the operator, and not its primary.
    scene.duo.doors[1].set(Link::Cut);
    let lost = |s: &v1::Status| s.link.as_ref().is_some_and(|link| link.state != "attached");
    scene.duo.until(0, "link lost", lost).await?;
    scene.duo.write(0, VOLUME, 3, 7).await?;
    let waits = ["switchover", "--timeout", "500ms"];
    scene.refused(&urls, &waits, &["the primary goes on as before", "not everything is on the backup"]).await?;
    scene.refused(&urls, &["verify"], &["backup"]).await?;
    scene.duo.write(0, VOLUME, 4, 8).await?;
    scene.duo.kill(1);
    scene.refused(&urls, &["switchover"], &["the backup", "cannot reach"]).await?;
    scene.refused(&urls, &["verify"], &["backup"]).await?;
    scene.duo.write(0, VOLUME, 5, 9).await?;
    scene.duo.run(1, Role::Backup).await?;
    scene.duo.doors[1].set(Link::Open);
    scene.goes_on(0, 4).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_role_is_not_made_twice_and_the_wrong_binary_is_refused() -> Result<()> {
    let mut scene = Scene::start().await?;
    scene.duo.kill(0);
    let addresses = [String::from("http://127.0.0.1:1"), scene.url(1)?];
    let urls = addresses.each_ref().map(String::as_str);
    // The primary has been heard of a moment ago.
    scene.duo.promote(1, v1::PromoteRequest::default()).await?;
    scene.duo.again(1, Role::Primary).await?;
    let promoted = scene.url(1)?;
    scene
        .refused(&[urls[0], &promoted], &["promote"], &["after a change of role look at the status of both sides"])
        .await?;

    scene.duo.run(0, Role::Primary).await?;
    scene.duo.until(0, "fenced", |status| status.fenced_by > 0).await?;
    let old = scene.url(0)?;
    let demoted = understudy(&[&old], &["demote"]).await?;
    ensure!(demoted.status.success(), "{}", String::from_utf8_lossy(&demoted.stderr));
    scene.duo.again(0, Role::Backup).await?;
    let demoted = scene.url(0)?;
    scene
        .refused(&[&demoted, &promoted], &["demote"], &["after a change of role look at the status of both sides"])
        .await?;
    scene.duo.until_joined(1).await?;

    // Each directory by the binary of its former role.
    for (node, now, wrong) in [(0, Role::Backup, Role::Primary), (1, Role::Primary, Role::Backup)] {
        scene.duo.kill(node);
        let dir = scene.duo.data_dir(node).display().to_string();
        let word = format!("belongs to a {}", now.name());
        scene.duo.refuses(node, wrong, &word).await?;
        if now == Role::Backup {
            scene.refused(&[], &["demote", "--dir", &dir], &[&word]).await?;
        }
        scene.duo.run(node, now).await?;
    }
    scene.goes_on(1, 5).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_cut_to_what_holds_data_and_not_further() -> Result<()> {
    let mut scene = Scene::start().await?;
    let urls = [scene.url(0)?, scene.url(1)?];
    let urls = urls.each_ref().map(String::as_str);
    let done = async |args: &[&str]| -> Result<()> {
        let output = understudy(&urls, args).await?;
        ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    let size = async |scene: &Scene| -> Result<usize> { Ok(scene.duo.identical(0, VOLUME).await?.len()) };
    scene.duo.write(0, VOLUME, 60, 6).await?;
    let below = ["volume", "resize", VOLUME, "--size", "128KiB"];
    scene.refused(&urls, &below, &["data behind the new end, the first at byte 245760", "discard it"]).await?;
    scene.refused(&urls, &["volume", "resize", VOLUME, "--size", "0"], &["size"]).await?;
    done(&["snapshot", "create", "data@larger"]).await?;

    // In continuous mode the record travels.
    done(&["volume", "resize", VOLUME, "--size", "128KiB", "--discard"]).await?;
    scene.duo.until_joined(0).await?;
    ensure!(size(&scene).await? == 128 << 10, "it is not cut");
    scene.refused(&urls, &["read", VOLUME, "--offset", "245760", "--length", "4096"], &["245760"]).await?;
    scene.refused(&urls, &["snapshot", "restore", "data@larger"], &["262144", "131072", "resize it first"]).await?;
    scene.goes_on(0, 2).await?;

    // Cut and larger again behind a link that is down: of both the backup hears nothing but the size.
    scene.duo.write(0, VOLUME, 30, 7).await?;
    scene.duo.until_joined(0).await?;
    scene.duo.doors[1].set(Link::Cut);
    scene.duo.until(0, "delta mode", |s| s.volumes.iter().all(|v| v.mode() == v1::Mode::Delta)).await?;
    done(&["volume", "resize", VOLUME, "--size", "64KiB", "--discard"]).await?;
    done(&["volume", "resize", VOLUME, "--size", "128KiB"]).await?;
    scene.duo.doors[1].set(Link::Open);
    scene.goes_on(0, 3).await?;
    let image = scene.duo.identical(0, VOLUME).await?;
    ensure!(image[64 << 10..].iter().all(|byte| *byte == 0), "what was cut off is back");

    // The snapshot is as large as it was, and can be gone back to.
    scene.duo.kill(0);
    let (dead, promoted) = (String::from("http://127.0.0.1:1"), scene.url(1)?);
    let output = understudy(&[&dead, &promoted], &["promote", "--force", "--at", "larger"]).await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    scene.duo.again(1, Role::Primary).await?;
    // It is served when all of it is copied.
    let deadline = Instant::now() + PATIENCE;
    loop {
        match scene.duo.read(1, VOLUME, 60).await {
            Ok(block) => break ensure!(block == load::fill(0, 60, 6), "the snapshot's block is not back"),
            Err(status) => ensure!(Instant::now() < deadline, "not served: {status}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
