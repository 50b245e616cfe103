//! A backup that vanishes without a reset: frozen, or gone with its address while its name moves to another one.
//!
//! Real processes; `UNDERSTUDY_BIN_DIR` names the binaries to test.

use std::{fs, net::SocketAddr, path::Path};

use anyhow::{Context as _, Result, ensure};
use tonic::{Code, transport::Channel};
use understudy_common::proxy::{Link, Proxy};
use understudy_proto::v1::{self, AckRule, AwayRule, block_service_client::BlockServiceClient};
use understudy_tests::process::{
    Node, Role, has_namespaces,
    load::{self, BLOCK_BYTES},
    pair::Pair,
    service_with_hosts,
};

const VOLUME: &str = "both";

/// A write of one block whose content is `stamp`, under the sequence `stamp`.
fn write(block: u64, stamp: u64) -> v1::WriteBlockRequest {
    v1::WriteBlockRequest {
        volume: VOLUME.into(),
        offset_bytes: block * BLOCK_BYTES as u64,
        data: content(block, stamp),
        client_id: "tester".into(),
        sequence: stamp,
        ..Default::default()
    }
}

fn content(block: u64, stamp: u64) -> bytes::Bytes {
    load::fill(0, usize::try_from(block).expect("a small number"), stamp)
}

fn lsn(answer: &v1::WriteBlockResponse) -> u64 {
    answer.position.unwrap_or_default().lsn
}

/// Both sides hold `blocks` from the volume's start on.
async fn both_hold(pair: &Pair, blocks: &[bytes::Bytes]) -> Result<()> {
    pair.wait_caught_up().await?;
    for role in [Role::Primary, Role::Backup] {
        let image = pair.read_image(role, VOLUME).await?;
        for (number, (found, expected)) in image.chunks(BLOCK_BYTES).zip(blocks).enumerate() {
            ensure!(found == expected, "block {number} of the {} holds {:?}", role.name(), &found[..8]);
        }
    }
    Ok(())
}

/// The link is not lost yet when the write comes, so it is taken; then nobody confirms it.
#[tokio::test]
async fn write_to_a_frozen_backup_is_unknown_at_the_deadline_and_there_once_after_the_thaw() -> Result<()> {
    // The link outlives the time between the freeze and the write, and is lost long before the deadline.
    let pair = Pair::start_with(
        &[
            ["--link-heartbeat", "100ms"],
            ["--link-timeout", "2s"],
            ["--link-reconnect-max", "200ms"],
            ["--limits-request-deadline", "8s"],
            ["--limits-queue-wait", "500ms"],
        ]
        .concat(),
    )
    .await?;
    pair.create_volume(VOLUME, 2, AckRule::Both, AwayRule::Block).await?;
    let mut client: BlockServiceClient<Channel> = BlockServiceClient::new(pair.node(Role::Primary)?.channel()?);
    let first = lsn(&pair.until_acknowledged(&mut client, write(0, 1)).await?);

    pair.node(Role::Backup)?.freeze()?;
    let unknown = client.write_block(write(0, 2)).await.expect_err("nobody has confirmed it");
    assert_eq!(unknown.code(), Code::Unavailable, "{unknown}");
    // Seven eighths of the deadline: the answer has to reach the client before its call ends.
    let expected = format!("LSN {} here, and the backup did not confirm it within 7000 ms", first + 1);
    assert!(unknown.message().contains(&expected) && unknown.message().contains("unknown"), "{unknown}");

    // By now the link is lost: a new write is refused and not executed.
    pair.wait_attached(false).await?;
    let refused = client.write_block(write(1, 3)).await.expect_err("the backup is away");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(refused.message().contains("the backup is away"), "{refused}");

    pair.node(Role::Backup)?.thaw()?;
    let again = pair.until_acknowledged(&mut client, write(0, 2)).await?;
    assert!(again.duplicate && lsn(&again) == first + 1, "{again:?}");
    assert_eq!(again.durability, i32::from(v1::Durability::Both));
    both_hold(&pair, &[content(0, 2), content(1, 0)]).await?;

    // A later write, and the old one once more: it does not come back.
    let later = pair.until_acknowledged(&mut client, write(0, 4)).await?;
    // Steps between modes have taken places of their own.
    assert!(!later.duplicate && lsn(&later) > first + 1, "{later:?}");
    assert!(pair.until_acknowledged(&mut client, write(0, 2)).await?.duplicate);
    both_hold(&pair, &[content(0, 4), content(1, 0)]).await
}

/// The name of the backup leads to 127.0.0.2, then to 127.0.0.3, then back: first the old address falls silent, then it
/// resets. Both lead to the same backup through links of their own, so that each can be taken away alone.
#[tokio::test]
async fn new_address_behind_the_name_is_followed() -> Result<()> {
    if !has_namespaces() {
        ensure!(std::env::var_os("CI").is_none(), "mount namespaces are needed, and this machine has none");
        eprintln!("NOT CHECKED: this machine has no mount namespaces");
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let hosts = directory.path().join("hosts");
    resolve(&hosts, "127.0.0.2")?;
    let backup = Node::start(Role::Backup, &directory.path().join("backup"), &[]).await?;
    let target = backup.replica.context("ready")?;
    let old = Proxy::start_at(([127, 0, 0, 2], 0).into(), target).await?;
    let port = old.address().port();
    let new = Proxy::start_at(SocketAddr::from(([127, 0, 0, 3], port)), target).await?;
    let url = format!("http://backup.test:{port}");
    let args = [
        ["--backup-url", &url],
        ["--link-heartbeat", "100ms"],
        ["--link-timeout", "500ms"],
        ["--link-ack-deadline", "1s"],
        ["--link-reconnect-max", "200ms"],
    ];
    let command = service_with_hosts(Role::Primary, &hosts);
    let mut primary = Node::spawn_by(command, &directory.path().join("primary"), &args.concat())?;
    primary.wait_ready().await?;
    let pair = Pair::of(directory, primary, backup, old);
    pair.create_volume(VOLUME, 1, AckRule::Staged, AwayRule::Degrade).await?;
    let mut client: BlockServiceClient<Channel> = BlockServiceClient::new(pair.node(Role::Primary)?.channel()?);
    client.write_block(write(0, 1)).await?;
    both_hold(&pair, &[content(0, 1)]).await?;

    pair.link.set(Link::Frozen);
    pair.wait_attached(false).await?;
    client.write_block(write(0, 2)).await?;
    resolve(&hosts, "127.0.0.3")?;
    pair.wait_attached(true).await?;
    both_hold(&pair, &[content(0, 2)]).await?;

    new.set(Link::Cut);
    pair.wait_attached(false).await?;
    client.write_block(write(0, 3)).await?;
    resolve(&hosts, "127.0.0.2")?;
    pair.link.set(Link::Open);
    pair.wait_attached(true).await?;
    both_hold(&pair, &[content(0, 3)]).await
}

/// In place: a file of another inode would not be seen through the mount.
fn resolve(hosts: &Path, address: &str) -> Result<()> {
    Ok(fs::write(hosts, format!("127.0.0.1 localhost\n{address} backup.test\n"))?)
}
