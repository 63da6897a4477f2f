"""Publishing a checkpoint, giving it an expiry, and downloading it."""

import tarfile
import urllib.request

import tinker

service_client = tinker.ServiceClient()
training_client = service_client.create_lora_training_client("luthier/demo", rank=4, seed=5)
path = training_client.save_weights_for_sampler("final").result().path
rest_client = service_client.create_rest_client()


def is_public() -> bool:
    run = tinker.ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id
    return rest_client.list_checkpoints(run).result().checkpoints[0].public


rest_client.publish_checkpoint_from_tinker_path(path).result()
print(is_public())
rest_client.unpublish_checkpoint_from_tinker_path(path).result()
print(is_public())
rest_client.set_checkpoint_ttl_from_tinker_path(path, 7200).result()

archive = rest_client.get_checkpoint_archive_url_from_tinker_path(path).result()
urllib.request.urlretrieve(archive.url, "archive.tar")
with tarfile.open("archive.tar") as tar:
    print(sorted(tar.getnames()))
