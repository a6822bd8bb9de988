{{/*
Everything here takes (dict "root" $ "name" pool's name "pool" its merged settings).
*/}}
{{- define "arc-topk.poolName" -}}
{{ include "arc-topk.fullname" .root }}-{{ .name }}
{{- end }}

{{- define "arc-topk.poolSelector" -}}
{{- include "arc-topk.selector" (dict "root" .root "component" "worker" "pool" .name) }}
{{- end }}

{{- define "arc-topk.poolLabels" -}}
{{- include "arc-topk.labels" (dict "root" .root "component" "worker" "pool" .name "extra" .pool.labels) }}
{{- end }}

{{/* Whether pods of the pool have names that others must find. */}}
{{- define "arc-topk.poolNamed" -}}
{{- if or (eq .pool.kind "StatefulSet") .pool.torchDistributed.enabled }}true{{ end }}
{{- end }}

{{/* Environment of a worker: what is told to each, and the built-in trainer's settings. YAML. */}}
{{- define "arc-topk.workerSettings" -}}
{{- $job := .root.Values.job }}
{{- $settings := dict "ARC_JOB" (include "arc-topk.jobName" .root) }}
{{- $_ := set $settings "ARC_SHARD_ADDRESSES" (include "arc-topk.shardAddresses" .root) }}
{{- $_ := set $settings "ARC_CERTS" "/etc/arc-topk/certs" }}
{{- if .pool.builtIn }}
{{- $_ := set $settings "ARC_LOG" $job.log }}
{{- range list $job.connection $job.algorithm $job.trainer .pool.trainer }}
{{- range $key, $value := . }}
{{- if not (kindIs "invalid" $value) }}
{{- $_ := set $settings (printf "ARC_%s" (upper $key)) $value }}
{{- end }}
{{- end }}
{{- end }}
{{- else }}
{{- /* PyTorch asks for the user's name, and the image's user may have none. */}}
{{- $own := list }}
{{- range .pool.extraEnv }}
{{- $own = append $own .name }}
{{- end }}
{{- range list "USER" "LOGNAME" }}
{{- if not (has . $own) }}
{{- $_ := set $settings . "arc" }}
{{- end }}
{{- end }}
{{- end }}
{{- if .pool.metrics.enabled }}
{{- $_ := set $settings "ARC_ADMIN" (printf "%s:%d" .root.Values.shards.listenAddress (int .pool.metrics.port)) }}
{{- end }}
{{- if .pool.torchDistributed.enabled }}
{{- $_ := set $settings "MASTER_PORT" .pool.torchDistributed.port }}
{{- $_ := set $settings "WORLD_SIZE" .pool.most }}
{{- $_ := set $settings "LOCAL_RANK" 0 }}
{{- end }}
{{- toYaml $settings }}
{{- end }}

{{- define "arc-topk.workerContainer" -}}
{{- $pool := .pool }}
image: {{ include "arc-topk.image" (dict "root" .root "image" $pool.image) }}
imagePullPolicy: {{ $pool.image.pullPolicy }}
{{- if $pool.builtIn }}
args:
  {{- toYaml (concat (list "train") $pool.args) | nindent 2 }}
{{- else }}
command:
  {{- toYaml $pool.command | nindent 2 }}
{{- with $pool.args }}
args:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with $pool.workingDir }}
workingDir: {{ . }}
{{- end }}
env:
  {{- range $name, $value := include "arc-topk.workerSettings" . | fromYaml }}
  - name: {{ $name }}
    value: {{ include "arc-topk.text" $value | quote }}
  {{- end }}
  {{- if $pool.torchDistributed.enabled }}
  - name: RANK
    valueFrom:
      fieldRef:
        fieldPath: metadata.labels['batch.kubernetes.io/job-completion-index']
  {{- end }}
  {{- with .extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with $pool.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $pool.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $pool.metrics.enabled }}
ports:
  - name: admin
    containerPort: {{ int $pool.metrics.port }}
    protocol: TCP
{{- end }}
{{- with $pool.startupProbe }}
startupProbe:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pool.livenessProbe }}
livenessProbe:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $member := dict "httpGet" (dict "path" "/readyz" "port" "admin") "periodSeconds" 10 "timeoutSeconds" 3 }}
{{- with default ($pool.metrics.enabled | ternary $member dict) $pool.readinessProbe }}
readinessProbe:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "arc-topk.workerResources" $pool | fromYaml }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pool.securityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - name: certs
    mountPath: /etc/arc-topk/certs
    readOnly: true
  - name: tmp
    mountPath: /tmp
  {{- if $pool.sharedMemory }}
  - name: shared-memory
    mountPath: /dev/shm
  {{- end }}
  {{- if $pool.files }}
  - name: files
    mountPath: {{ $pool.filesPath }}
    readOnly: true
  {{- end }}
  {{- with $pool.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Resources with the GPUs among the limits, which are the requests, too. */}}
{{- define "arc-topk.workerResources" -}}
{{- $resources := .resources }}
{{- if gt (int .gpu.count) 0 }}
{{- $gpus := dict "limits" (dict .gpu.resource (int .gpu.count)) }}
{{- $resources = include "arc-topk.merged" (dict "base" $resources "over" $gpus) | fromYaml }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "arc-topk.workerVolumes" -}}
{{- include "arc-topk.certsVolume" (dict "root" .root "role" "worker") }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .pool.tmpSize }}
{{- with .pool.sharedMemory }}
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ . }}
{{- end }}
{{- if .pool.files }}
- name: files
  configMap:
    name: {{ include "arc-topk.poolName" . }}-files
{{- end }}
{{- with .pool.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* How spot nodes are marked. YAML with nodeSelector and tolerations. */}}
{{- define "arc-topk.spotMarks" -}}
{{- $marks := dict
  "gke" (list "cloud.google.com/gke-spot" "true" true)
  "eks" (list "eks.amazonaws.com/capacityType" "SPOT" false)
  "aks" (list "kubernetes.azure.com/scalesetpriority" "spot" true)
  "karpenter" (list "karpenter.sh/capacity-type" "spot" false) }}
{{- with get $marks .provider }}
nodeSelector:
  {{ index . 0 }}: {{ index . 1 | quote }}
{{- if index . 2 }}
tolerations:
  - key: {{ index . 0 }}
    operator: Equal
    value: {{ index . 1 | quote }}
    effect: NoSchedule
{{- end }}
{{- end }}
{{- end }}

{{/* On which nodes the pool's workers run. */}}
{{- define "arc-topk.workerPlacement" -}}
{{- $pool := .pool }}
{{- $nodes := deepCopy $pool.nodeSelector }}
{{- $tolerations := $pool.tolerations }}
{{- if gt (int $pool.gpu.count) 0 }}
{{- with $pool.gpu.product }}
{{- $_ := set $nodes $pool.gpu.productLabel . }}
{{- end }}
{{- if $pool.gpu.tolerate }}
{{- $tolerations = append $tolerations (dict "key" $pool.gpu.resource "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- end }}
{{- if $pool.spot.enabled }}
{{- $marks := include "arc-topk.spotMarks" $pool.spot | fromYaml }}
{{- range $key, $value := default dict $marks.nodeSelector }}
{{- $_ := set $nodes $key $value }}
{{- end }}
{{- $tolerations = concat $tolerations (default list $marks.tolerations) }}
{{- end }}
{{- with $nodes }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pool.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pool.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- include "arc-topk.spread" (dict "root" $.root "component" "worker" "pool" $.name "constraints" .) | trim | nindent 2 }}
{{- end }}
{{- end }}

{{/* Pod template, with "restartPolicy" and "extraEnv" beside the usual arguments. */}}
{{- define "arc-topk.workerPod" -}}
{{- $pool := .pool }}
{{- $sum := dict }}
{{- with $pool.files }}
{{- $_ := set $sum "checksum/files" (toYaml . | sha256sum) }}
{{- end }}
metadata:
  labels:
    {{- include "arc-topk.podLabels" (dict "root" .root "component" "worker" "pool" .name "extra" $pool.podLabels) | nindent 4 }}
  {{- include "arc-topk.annotations" (dict "root" .root "own" (list $sum $pool.podAnnotations) "indent" 2) }}
spec:
  {{- $account := default (include "arc-topk.serviceAccountName" .root) $pool.serviceAccountName }}
  {{- include "arc-topk.podCommon" (dict "root" .root "settings" $pool "serviceAccountName" $account) | trim | nindent 2 }}
  restartPolicy: {{ .restartPolicy }}
  {{- $seconds := $pool.terminationGracePeriodSeconds }}
  {{- if $pool.spot.enabled }}
  {{- $seconds = $pool.spot.terminationGracePeriodSeconds }}
  {{- end }}
  terminationGracePeriodSeconds: {{ int $seconds }}
  {{- with $pool.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- if and (include "arc-topk.poolNamed" .) (eq $pool.kind "Job") }}
  subdomain: {{ include "arc-topk.poolName" . }}
  {{- end }}
  containers:
    - name: worker
      {{- include "arc-topk.workerContainer" . | trim | nindent 6 }}
    {{- with $pool.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "arc-topk.workerVolumes" . | trim | nindent 4 }}
  {{- with include "arc-topk.workerPlacement" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end }}
